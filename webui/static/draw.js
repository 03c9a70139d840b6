// Drawing with what was trained, and the gallery.

import {$, act, bring, button, el, enlarge, field, hint, look, sync, t, values} from "./common.js";
import {showJobs} from "./jobs.js";

const NUMBERS = {
  num_images: "4",
  seed: "0",
  width: "",
  height: "",
  num_inference_steps: "30",
  guidance_scale: "",
  lora_scale: "1",
  subject_start: "0",
};
const HINTS = {subject_start: "hint_subject_start"};
const WITH_LORA = ["lora", "pivotal"],
  ADAPTERS = ["lora", "pivotal", "textual_inversion"];
let state = {items: [], adapters: []},
  count = 60;

export function start() {
  $("draw_fields").append(
    field("drawn_with", "choice", {choices: [], wide: true}),
    field("prompt", "long", {wide: true, hint: t("hint_prompt")}),
    field("negative_prompt", "text", {wide: true}),
    ...Object.entries(NUMBERS).map(([name, placeholder]) =>
      field(name, "number", {placeholder: placeholder || t("by_the_program"), hint: HINTS[name] && t(HINTS[name])}),
    ),
  );
  const form = $("draw_form").elements;
  form.drawn_with.onchange = () => choose(form.drawn_with.value);
  $("draw_form").onsubmit = draw;
  $("add_adapter").onclick = () => addAdapter();
  $("adapter_file").onchange = async event => {
    const file = event.target.files[0],
      answer = file && (await bring("adapter", file));
    event.target.value = "";
    if (answer) {
      state.adapters.push(answer.name);
      addAdapter(answer.name);
    }
  };
  $("more_pictures").onclick = () => {
    count += 120;
    showGallery();
  };
}

// What is drawn with; the prompt becomes its own unless one was written already.
export function choose(id) {
  const form = $("draw_form").elements,
    item = state.items.find(item => item.id === id);
  if (!item) return;
  form.drawn_with.value = id;
  if (!form.prompt.value || form.prompt.dataset.own === form.prompt.value) {
    form.prompt.value = form.prompt.dataset.own = `${item.prompt || "[identifier]"} on the moon`;
  }
  const hasLora = WITH_LORA.includes(item.method);
  form.lora_scale.closest("label").hidden = !hasLora;
  if (!hasLora) form.lora_scale.value = NUMBERS.lora_scale; // which would be refused
  form.width.placeholder = form.height.placeholder = item.resolution ?? t("by_the_program");
}

export function showDraw(now) {
  state = now;
  const trained = state.items.filter(item => item.trained),
    select = $("draw_form").elements.drawn_with,
    chosen = select.value;
  const options = trained.map(item => [item.id, item.title]);
  if (JSON.stringify(options) !== select.dataset.options) {
    select.dataset.options = JSON.stringify(options);
    select.replaceChildren(...options.map(([value, text]) => el("option", {value, textContent: text})));
    choose(options.some(([id]) => id === chosen) ? chosen : options[0]?.[0]);
  }
  $("draw_button").disabled = !trained.length;
  showJobs(
    $("draw_jobs"),
    state.jobs.filter(job => job.kind === "draw"),
    1,
  );
  const drawn = state.jobs.filter(job => job.kind === "draw").map(job => [job.id, job.state, job.bar.done]);
  const key = JSON.stringify([drawn, state.items.map(item => item.title)]);
  if (key !== $("gallery").dataset.jobs) {
    $("gallery").dataset.jobs = key;
    showGallery();
  }
}

function addAdapter(source, strength) {
  const mine = $("draw_form").elements.drawn_with.value;
  const others = state.items.filter(item => item.trained && ADAPTERS.includes(item.method) && item.id !== mine);
  const choices = [...others.map(item => [item.id, item.title]), ...state.adapters.map(name => [name, name])];
  const select = el(
    "select",
    {"aria-label": t("add_adapter")},
    choices.map(([value, text]) => el("option", {value, textContent: text})),
  );
  const number = el("input", {
    placeholder: "1",
    value: strength ?? "",
    inputMode: "decimal",
    "aria-label": t("strength"),
    title: t("strength"),
  });
  if (source) select.value = source;
  const row = el(
    "div",
    {className: "adapter"},
    select,
    number,
    button("remove", () => row.remove()),
  );
  $("adapters").append(choices.length ? row : hint(t("no_adapters", {folder: `${state.folder}/adapters`})));
}

async function draw(event) {
  event.preventDefault();
  const form = values($("draw_form"));
  const adapters = [...document.querySelectorAll(".adapter")].map(row => ({
    source: row.querySelector("select").value,
    strength: row.querySelector("input").value,
  }));
  await act("draw", {...form, item: form.drawn_with, adapters});
}

export async function showGallery() {
  const found = await look("pictures", {count});
  if (!found) return;
  const titles = new Map(state.items.map(item => [item.id, item.title]));
  const pictures = found.pictures.map(picture => ({id: picture.name, title: titles.get(picture.item) ?? t("model_gone"), ...picture}));
  sync($("gallery"), pictures.length ? pictures : [{id: "none"}], thumbnail);
  $("more_pictures").hidden = found.total <= pictures.length;
}

function thumbnail(picture) {
  if (picture.id === "none") return hint(t("gallery_empty"));
  const image = el("img", {src: picture.url, alt: picture.prompt, loading: "lazy"});
  const below = [picture.prompt, picture.title].map(textContent => el("span", {textContent}));
  return el("div", {}, el("button", {type: "button", onclick: () => open(picture)}, image, below));
}

function open(picture) {
  const dialog = $("large"),
    item = state.items.find(item => item.id === picture.item);
  enlarge(
    picture.url,
    el("p", {}, el("b", {textContent: picture.prompt})),
    picture.negative_prompt ? el("p", {textContent: `${t("field_negative_prompt")}: ${picture.negative_prompt}`}) : "",
    el("p", {className: "hint", textContent: `${picture.title} · ${picture.settings}`}),
    el(
      "div",
      {className: "row"},
      item
        ? button("again_with_these", () => {
            refill(picture);
            dialog.close();
          })
        : "",
      el("a", {className: "button quiet", href: picture.url, download: picture.name, textContent: t("download")}),
      button("delete", async () => {
        dialog.close();
        if (await act("delete_picture", {name: picture.name})) showGallery();
      }),
    ),
  );
}

// The form as it was when a picture was drawn.
function refill(picture) {
  const form = $("draw_form").elements;
  choose(picture.item);
  for (const name of ["prompt", "negative_prompt", ...Object.keys(NUMBERS)]) form[name].value = picture[name] ?? "";
  form.num_images.value = 1;
  $("adapters").replaceChildren();
  for (const [path, strength] of picture.adapters) {
    const item = state.items.find(item => item.output === path),
      file = path.split("/").at(-1);
    if (item || state.adapters.includes(file))
      addAdapter(item ? item.id : file, item?.method === "textual_inversion" ? "" : strength);
  }
  $("draw_form").scrollIntoView({behavior: "smooth"});
}
