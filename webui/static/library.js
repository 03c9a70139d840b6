// The library: a card for each thing that was trained.

import {$, act, button, date, el, enlarge, hint, sync, t} from "./common.js";
import {drawWith, link, showJobs} from "./jobs.js";
import {again} from "./train.js";

export function showLibrary(state) {
  showJobs(
    $("exports"),
    state.jobs.filter(job => job.kind === "export"),
    1,
  );
  sync($("cards"), state.items.length ? state.items : [{id: "none"}], card);
}

function facts(item) {
  const scores = Object.entries({dino: "DINO", clip_i: "CLIP-I", clip_t: "CLIP-T"}).filter(
    ([key]) => typeof item.scores[key] === "number",
  );
  const rows = [
    ["fact_word", item.words.join(", ")],
    ["fact_class", item.class_prompt],
    ["fact_method", item.method && t(`choice_${item.method}`)],
    ["fact_model", item.model],
    ["fact_steps", item.steps],
    ["fact_date", item.date && date(item.date)],
    ["fact_scores", scores.map(([key, name]) => `${name} ${item.scores[key].toFixed(3)}`).join(" · ")],
    ["fact_where", item.own ? "" : item.id],
  ];
  return el(
    "dl",
    {},
    rows
      .filter(([, value]) => value)
      .flatMap(([word, value]) => [el("dt", {textContent: t(word)}), el("dd", {textContent: value})]),
  );
}

function card(item) {
  if (item.id === "none") return hint(t("library_empty"));
  const title = el("h3", {textContent: item.title});
  const open = item.job
    ? () => {
        location.hash = link(item.job);
      }
    : () => enlarge(item.picture);
  return el(
    "div",
    {className: "card"},
    item.picture
      ? el("img", {src: item.picture, alt: item.title, loading: "lazy", onclick: open})
      : el("div", {className: "blank"}),
    title,
    item.state && item.state !== "done"
      ? el("span", {}, el("span", {className: `badge ${item.state}`, textContent: t(`state_${item.state}`)}))
      : null,
    facts(item),
    item.exported.map(file => el("a", {href: file.url, download: file.name, textContent: file.name})),
    el(
      "div",
      {className: "buttons"},
      item.trained ? drawWith(item.id, "draw") : null,
      item.job ? button("open", open) : null,
      item.own ? button("rename", () => rename(item, title)) : null,
      item.trained ? button("export", () => act("export", {item: item.id})) : null,
      ["stopped", "failed", "lost"].includes(item.state) ? button("resume", () => act("resume", {job: item.job})) : null,
      item.trained && item.own ? button("train_longer", () => again(item.id, true)) : null,
      item.own ? button("train_again", () => again(item.id, false)) : null,
      item.own ? button("delete", () => act("delete_item", {item: item.id})) : null,
    ),
  );
}

function rename(item, title) {
  const input = el("input", {value: item.title, maxLength: 80, "aria-label": t("rename")});
  const done = async () => {
    input.onblur = null;
    if (input.value === item.title || !(await act("retitle", {item: item.id, title: input.value}))) input.replaceWith(title);
  };
  input.onblur = done;
  input.onkeydown = event => {
    if (event.key === "Enter") done();
    if (event.key === "Escape") {
      input.onblur = null;
      input.replaceWith(title);
    }
  };
  title.replaceWith(input);
  input.focus();
  input.select();
}
