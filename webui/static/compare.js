// Several trainings side by side, by the program's --evaluate.

import {$, act, button, date, el, enlarge, field, sync, t, values} from "./common.js";
import {isAtWork, jobRow, rowShape} from "./jobs.js";

const SCORES = {dino: "DINO", clip_i: "CLIP-I", clip_t: "CLIP-T", clip_t_raw: "CLIP-T raw", pres: "PRES", div: "DIV", div_dino: "DIV_DINO"};

export function start() {
  $("compare_fields").append(field("num_images", "number", {label: t("pictures_of_each"), placeholder: "4"}),
    field("prompts", "long", {wide: true, hint: t("hint_prompts"), placeholder: "a [identifier] [class] on the moon"}));
  $("compare_form").onsubmit = async event => {
    event.preventDefault();
    const items = [...$("compare_items").querySelectorAll("input:checked")].map(input => input.value);
    const form = values($("compare_form"));
    await act("compare", {items, num_images: form.num_images, prompts: form.prompts});
  };
}

export function showCompare(state) {
  const trained = state.items.filter(item => item.trained);
  sync($("compare_items"), trained.length ? trained : [{id: "none"}], item => item.id === "none" ? el("p", {className: "hint", textContent: t("library_empty")}) :
    el("label", {}, el("input", {type: "checkbox", value: item.id}), item.picture ? el("img", {src: item.picture, alt: ""}) : "", item.title), item => [item.title, item.picture]);
  const entries = [...state.compared].sort((a, b) => b.made - a.made).map(entry => ({...entry, job: state.jobs.find(job => job.id === entry.job)}));
  sync($("comparisons"), entries, build, entry => [entry.rows, entry.comparison, entry.job && rowShape(entry.job)]);
}

function build(entry) {
  const row = entry.job && entry.job.state !== "done" ? jobRow(entry.job) : null;
  const node = el("div", {}, el("h2", {textContent: `${entry.title} · ${date(entry.made)}`}), row, entry.rows.length ? table(entry) : null,
    entry.comparison ? el("img", {src: entry.comparison, className: "sheet", alt: t("side_by_side"), onclick: () => enlarge(entry.comparison)}) : null,
    entry.rows.filter(model => model.sheet && !entry.comparison).map(model => el("img", {src: model.sheet, className: "sheet", alt: model.name, loading: "lazy"})),
    entry.comparison ? el("details", {}, el("summary", {textContent: t("all_pictures")}), entry.rows.map(model => el("img", {src: model.sheet, className: "sheet", alt: model.name, loading: "lazy"}))) : null,
    entry.job && isAtWork(entry.job) ? null : el("div", {className: "row"}, button("delete", () => act("delete_compared", {id: entry.id}))));
  node.update = now => { if (row && now.job) row.update(now.job); };
  return node;
}

function table(entry) {
  const columns = Object.entries(SCORES).filter(([key]) => entry.rows.some(row => typeof row.scores[key] === "number"));
  const cells = (name, scores) => el("tr", {}, el("td", {textContent: name}), columns.map(([key]) => el("td", {textContent: typeof scores[key] === "number" ? scores[key].toFixed(3) : "–"})));
  return el("div", {}, el("div", {className: "table"}, el("table", {}, el("thead", {}, el("tr", {}, el("th"), columns.map(([, name]) => el("th", {textContent: name})))),
    el("tbody", {}, cells(t("real_photos"), entry.rows[0].real), entry.rows.map(row => cells(row.name, row.scores))))),
  el("p", {className: "hint", textContent: t("scores_hint")}));
}
