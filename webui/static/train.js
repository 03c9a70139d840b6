// The next training: photos as the program sees them, its fields, and the line.

import {$, act, bring, button, el, field, look, say, sync, t, values} from "./common.js";
import {link, showJobs} from "./jobs.js";

const MAIN = ["class_prompt", "title", "method", "model_name"];
const LONG_HINTS = [
  "method",
  "model_name",
  "steps",
  "validation_steps",
  "train_text_encoder",
  "num_class_images",
  "select_best",
  "identifier",
  "max_vram",
];
const SHAPING = ["model_name", "resolution"]; // fields that decide what is cut off
let fields,
  suggested = null,
  touched = new Set(),
  kept = Promise.resolve(); // once what was typed last is remembered

export async function start() {
  const defaults = await look("defaults");
  const draft = await look("draft");
  fields = defaults.fields;
  for (const entry of [fields[0], {name: "title", kind: "text", choices: [], methods: []}, ...fields.slice(1)]) {
    const value = draft.fields[entry.name];
    const box = MAIN.includes(entry.name) ? $("main_fields") : $("more_fields");
    const choices = entry.choices.map(value => [value, t(`choice_${value}`)]);
    const hint = entry.name === "class_prompt" || LONG_HINTS.includes(entry.name) ? t(`hint_${entry.name}`) : "";
    const node = field(entry.name, entry.kind, {
      choices,
      hint,
      value: value ?? (entry.kind === "choice" ? entry.default : undefined),
    });
    if (value !== undefined) touched.add(entry.name);
    node.dataset.methods = entry.methods.join(" ");
    box.append(node);
  }
  $("train_form").elements.model_name.setAttribute("list", "models");
  $("main_fields").append(
    el(
      "datalist",
      {id: "models"},
      ["demo", "sd15", "sd21", "sdxl"].map(value => el("option", {value})),
    ),
  );
  $("train_form").oninput = event => touched.add(event.target.name); // at once: refill() may be under way
  $("train_form").onchange = event => {
    kept = kept.then(() => keep(event.target.name));
  };
  $("train_form").onsubmit = train;
  $("photo_files").onchange = event => add([...event.target.files]);
  $("clear_photos").onclick = async () => {
    await act("clear_draft");
    showDraft(await look("draft"));
  };
  dropZone();
  showDraft(draft);
  await refill();
}

async function keep(name) {
  touched.add(name);
  await refill();
  const now = values($("train_form"));
  if (!touched.has("validation_steps")) delete now.validation_steps;
  await act("keep_fields", now);
  if (SHAPING.includes(name)) showDraft(await look("draft"));
}

// The recipe's own values where fields are empty, and only the fields that the method has.
async function refill() {
  const form = $("train_form"),
    now = values(form);
  for (const label of form.querySelectorAll("label[data-methods]")) {
    label.hidden = label.dataset.methods !== "" && !label.dataset.methods.split(" ").includes(now.method);
  }
  const query = {method: now.method, model_name: now.model_name};
  for (const name of ["train_text_encoder", "select_best"]) query[name] = now[name] ? "1" : "";
  const {recipe} = (await look("defaults", query)) ?? {recipe: {}};
  for (const {name, kind} of fields) {
    const unknown = name in recipe ? "none" : EMPTY.includes(name) ? `empty_${name}` : "by_the_program";
    if (kind === "text" || kind === "number") form.elements[name].placeholder = recipe[name] ?? t(unknown);
  }
  const model = now.model_name || recipe.model_name;
  $("machine").hidden = model !== "demo";
  $("machine").textContent = t("demo_note");
  const steps = Number(form.elements.steps.value || recipe.steps);
  suggested = steps && !now.select_best ? String(Math.ceil(steps / 5)) : "";
  if (!touched.has("validation_steps")) form.elements.validation_steps.value = suggested;
}
const EMPTY = ["class_prompt", "validation_steps", "instance_prompt"]; // with a word of their own for when they are empty

function dropZone() {
  const zone = $("drop");
  for (const target of [document.body]) {
    target.addEventListener("dragover", event => {
      event.preventDefault();
      zone.classList.add("over");
    });
    target.addEventListener("dragleave", () => zone.classList.remove("over"));
    target.addEventListener("drop", event => {
      event.preventDefault();
      zone.classList.remove("over");
      if (!$("view_train").hidden) add([...event.dataTransfer.files]);
    });
  }
}

async function add(files) {
  $("photo_files").value = "";
  for (const [number, file] of files.entries()) {
    say(t("bringing", {done: number + 1, total: files.length}), 60);
    if (!(await bring("photo", file))) return showDraft(await look("draft"));
  }
  say(t("looking"), 60);
  showDraft(await look("draft"));
  $("said").hidden = true;
  const prompt = $("train_form").elements.class_prompt;
  if (!prompt.value && matchMedia("(pointer: fine)").matches) prompt.focus(); // no keyboard over a telephone's photos
}

export function showDraft(draft) {
  if (!draft) return;
  const seen = draft.seen;
  $("photo_bar").hidden = !seen.photos.length && !seen.error;
  sync(
    $("photos"),
    seen.photos.map(photo => ({id: photo.name, ...photo})),
    photoFigure,
  );
  const used = draft.used && seen.photos.length ? [t("used_already")] : [];
  $("remarks").replaceChildren(
    ...(seen.error ? [el("li", {className: "bad", textContent: seen.error})] : []),
    ...[...used, ...seen.remarks].map(text => el("li", {textContent: text})),
  );
  const prompt = $("train_form").elements.class_prompt;
  if (seen.class_prompt && !prompt.value) prompt.value = seen.class_prompt;
  $("goes_on").hidden = !draft.goes_on;
  if (draft.goes_on) $("goes_on").textContent = t(`goes_on_${draft.goes_on.how}`, draft.goes_on);
}

function photoFigure(photo) {
  const caption = el("input", {value: photo.caption ?? "", placeholder: t("caption_placeholder"), "aria-label": t("caption")});
  caption.onchange = async () => {
    await act("caption", {name: photo.name, text: caption.value});
    showDraft(await look("draft"));
  };
  const remove = button("remove", async () => {
    await act("remove_photo", {name: photo.name});
    showDraft(await look("draft"));
  });
  remove.textContent = "×";
  remove.setAttribute("aria-label", t("remove"));
  return el(
    "figure",
    {},
    el("img", {src: photo.url, alt: photo.name}),
    el(
      "figcaption",
      {},
      el("div", {className: "name"}, photo.name, remove),
      el("div", {className: "hint"}, `${photo.size.join("×")}${photo.has_mask ? ` · ${t("mask")}` : ""}`),
      caption,
    ),
  );
}

async function train(event) {
  event.preventDefault();
  $("train_button").disabled = true;
  await kept; // else the name would be remembered after the training took it
  const form = values($("train_form")),
    title = form.title;
  delete form.title;
  const methodDefault = fields.find(({name}) => name === "method").default;
  if (form.method === methodDefault) delete form.method;
  const answer = await act("train", {fields: form, title});
  $("train_button").disabled = false;
  if (!answer) return;
  $("train_form").elements.title.value = "";
  location.hash = link(`trained/${answer.item}/job`);
  showDraft(await look("draft"));
}

// Photos and fields of an item in the draft.
export async function again(item, longer) {
  if (!(await act("train_again", {item, longer}))) return;
  location.hash = "#train";
  location.reload();
}

export const showLine = state =>
  showJobs(
    $("jobs"),
    state.jobs.filter(job => job.kind === "train"),
    5,
  );
