// Several trainings side by side, by the program's --evaluate.

import {$, act, button, date, el, enlarge, field, hint, sheet, sync, t, values} from "./common.js";
import {isAtWork, jobRow, rowShape} from "./jobs.js";

const SCORES = {
  dino: "DINO",
  clip_i: "CLIP-I",
  clip_t: "CLIP-T",
  clip_t_raw: "CLIP-T raw",
  pres: "PRES",
  div: "DIV",
  div_dino: "DIV_DINO",
};

export function start() {
  $("compare_fields").append(
    field("num_images", "number", {label: t("pictures_of_each"), placeholder: "4"}),
    field("prompts", "long", {wide: true, hint: t("hint_prompts"), placeholder: "a [identifier] [class] on the moon"}),
  );
  $("compare_form").onsubmit = async event => {
    event.preventDefault();
    const items = [...$("compare_items").querySelectorAll("input:checked")].map(input => input.value);
    const form = values($("compare_form"));
    await act("compare", {items, num_images: form.num_images, prompts: form.prompts});
  };
}

export function showCompare(state) {
  const trained = state.items.filter(item => item.trained);
  sync($("compare_items"), trained.length ? trained : [{id: "none"}], choice, item => [item.title, item.picture]);
  const entries = [...state.compared]
    .sort((a, b) => b.made - a.made)
    .map(entry => ({...entry, job: state.jobs.find(job => job.id === entry.job)}));
  sync($("comparisons"), entries, build, entry => [entry.rows, entry.comparison, entry.job && rowShape(entry.job)]);
}

function choice(item) {
  if (item.id === "none") return hint(t("library_empty"));
  const picture = item.picture ? el("img", {src: item.picture, alt: ""}) : "";
  return el("label", {}, el("input", {type: "checkbox", value: item.id}), picture, item.title);
}

function build(entry) {
  const row = entry.job && entry.job.state !== "done" ? jobRow(entry.job) : null;
  const sheets = entry.rows.filter(model => model.sheet).map(model => sheet(model.sheet, model.name));
  const node = el(
    "div",
    {},
    el("h2", {textContent: `${entry.title} · ${date(entry.made)}`}),
    row,
    entry.rows.length ? table(entry) : null,
    entry.comparison
      ? [
          hint(t("side_by_side", {names: entry.rows.map(model => model.name).join(", ")})),
          sheet(entry.comparison, "", () => enlarge(entry.comparison)),
          el("details", {}, el("summary", {textContent: t("all_pictures")}), sheets),
        ]
      : sheets,
    entry.job && isAtWork(entry.job)
      ? null
      : el(
          "div",
          {className: "row"},
          button("delete", () => act("delete_compared", {id: entry.id})),
        ),
  );
  node.update = now => {
    if (row && now.job) row.update(now.job);
  };
  return node;
}

function table(entry) {
  const columns = Object.entries(SCORES).filter(([key]) => entry.rows.some(row => typeof row.scores[key] === "number"));
  const number = score => el("td", {textContent: typeof score === "number" ? score.toFixed(3) : "–"});
  const cells = (name, scores) =>
    el(
      "tr",
      {},
      el("td", {textContent: name}),
      columns.map(([key]) => number(scores[key])),
    );
  return el(
    "div",
    {},
    el(
      "div",
      {className: "table"},
      el(
        "table",
        {},
        el(
          "thead",
          {},
          el(
            "tr",
            {},
            el("th"),
            columns.map(([, name]) => el("th", {textContent: name})),
          ),
        ),
        el(
          "tbody",
          {},
          cells(t("real_photos"), entry.rows[0].real),
          entry.rows.map(row => cells(row.name, row.scores)),
        ),
      ),
    ),
    hint(t("scores_hint")),
  );
}
