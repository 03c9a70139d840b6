// The line of jobs, and one job in full: progress, losses, samples, log.

import {$, act, button, el, enlarge, heading, hint, look, sheet, sync, t} from "./common.js";

export const isAtWork = job => job.state === "running" || job.state === "stopping";
export const link = id => `#job/${encodeURIComponent(id)}`;

export function progressText(job) {
  const bar = job.bar;
  if (job.state === "stopping") {
    return job.training?.total ? `${t("training_step", job.training)} · ${t("stopping_now")}` : `${t("state_stopping")} ...`;
  }
  if (!bar.total) return t("preparing");
  const known = bar.left === null ? "" : ` · ${t("time_left", {left: clock(bar.left)})}`;
  const left = bar.done === bar.total ? ` · ${t("still_at_work")}` : known; // what follows, such as measuring, may have no bar
  const training = job.training?.total && bar.title !== "training" ? `${t("training_step", job.training)} · ` : "";
  const word = `bar_${bar.title.split(" ")[0]}`; // a download has none
  return `${training}${t(word) === word ? bar.title : t(word)} ${bar.done}/${bar.total}${left}`;
}

function clock(seconds) {
  const parts = [Math.floor(seconds / 3600), Math.floor(seconds / 60) % 60, seconds % 60];
  return (parts[0] ? parts : parts.slice(1)).map((part, i) => (i ? String(part).padStart(2, "0") : part)).join(":");
}

function fraction(job) {
  const bar = job.training?.total ? job.training : job.bar;
  return bar.total && bar.done < bar.total ? bar.done / bar.total : undefined;
}

// What the program said last; of a training that was stopped its step alone, as the remedy is the button beside it.
function lastWords(job) {
  const at = job.state === "stopped" && job.said.match(/step (\d+) of (\d+)/);
  return at ? t("training_step", {done: at[1], total: at[2]}) : job.said;
}

export const drawWith = (item, word) =>
  el("a", {className: "button go", href: `#draw/${encodeURIComponent(item)}`, textContent: t(word), "data-action": word});

function buttons(job) {
  return el(
    "span",
    {className: "buttons"},
    job.state === "running" ? button("stop", () => act("stop", {job: job.id})) : null,
    job.state === "stopping" ? button("stop_at_once", () => act("stop", {job: job.id})) : null,
    job.state === "waiting" ? button("take_out", () => act("stop", {job: job.id})) : null,
    job.state === "waiting" && job.kind !== "train" && !job.beside
      ? button("start_now", () => act("start_now", {job: job.id}))
      : null,
    job.state === "done" && job.kind === "train" && job.uses.length ? drawWith(job.uses[0], "draw_with_it") : null,
    job.can_resume ? button(job.kind === "train" ? "resume" : "once_more", () => act("resume", {job: job.id})) : null,
  );
}

export function jobRow(job) {
  const progress = el("progress", {max: 1}),
    text = el("div", {className: "hint progress_text"});
  const name = job.kind === "train" ? job.title : `${t(`kind_${job.kind}`)}: ${job.title}`;
  const node = el(
    "div",
    {className: "job"},
    el(
      "div",
      {className: "head"},
      el("a", {href: link(job.id), textContent: name}),
      el("span", {className: `badge ${job.state}`, textContent: t(`state_${job.state}`)}),
      buttons(job),
    ),
    job.prompts.length ? el("div", {className: "hint", textContent: job.prompts.join(" · ")}) : null,
    job.state === "waiting" && job.kind !== "train" && !job.beside
      ? el("div", {className: "hint", textContent: t("waits")})
      : null,
    isAtWork(job) ? [progress, text] : null,
    job.said && !isAtWork(job) ? el("div", {className: job.state === "failed" ? "bad" : "hint", textContent: lastWords(job)}) : null,
  );
  node.update = entry => {
    if (fraction(entry) === undefined) progress.removeAttribute("value");
    else progress.value = fraction(entry);
    text.textContent = progressText(entry);
  };
  return node;
}

export const rowShape = job => [job.state, job.title, job.said, job.prompts, job.beside];

// Running ones first, then those that wait, then the last that ended.
export function showJobs(box, jobs, ended) {
  const waiting = jobs.filter(job => job.state === "waiting");
  const order = job => [job.kind === "train" ? 1 : 0, job.made];
  waiting.sort((a, b) => order(a)[0] - order(b)[0] || order(a)[1] - order(b)[1]);
  const over = jobs
    .filter(job => !isAtWork(job) && job.state !== "waiting")
    .reverse()
    .slice(0, ended);
  sync(box, [...jobs.filter(isAtWork), ...waiting, ...over], jobRow, rowShape);
}

function curve(points) {
  // As wide as it is shown, so that letters are not scaled.
  const [height, left, bottom] = [220, 46, 24];
  const width = Math.min(900, $("view_job").clientWidth || 700); // as it is shown, so that letters are not scaled
  const svg = (tag, attributes, text) => {
    const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
    for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
    if (text !== undefined) node.textContent = text;
    return node;
  };
  const top = Math.max(...points.flatMap(([, ...losses]) => losses.filter(loss => loss !== null))) || 1;
  const last = points.at(-1)[0] || 1;
  const x = step => left + (step / last) * (width - left - 12),
    y = loss => height - bottom - (loss / top) * (height - bottom - 26);
  const image = svg("svg", {viewBox: `0 0 ${width} ${height}`, class: "curve", role: "img"});
  for (const part of [0, 0.5, 1]) {
    image.append(
      svg("line", {x1: left, x2: width - 12, y1: y(part * top), y2: y(part * top), class: "grid"}),
      svg("text", {x: left - 6, y: y(part * top) + 4, "text-anchor": "end"}, (part * top).toFixed(3)),
    );
  }
  image.append(svg("text", {x: width - 12, y: height - 6, "text-anchor": "end"}, t("step", {step: last})));
  ["instance", "prior"].forEach((name, number) => {
    const drawn = points.filter(point => point[number + 1] !== null);
    if (!drawn.length) return;
    image.append(
      svg("polyline", {class: name, points: drawn.map(point => `${x(point[0])},${y(point[number + 1])}`).join(" ")}),
      svg("text", {class: name, x: left + number * 110, y: 16}, t(`loss_${name}`)),
    );
  });
  return image;
}

let shown; // the id of the job in full
export async function showJob(id) {
  const view = $("view_job");
  if (shown !== id) {
    view.replaceChildren();
    shown = id;
  }
  const job = await look("job", {id});
  if (!job || shown !== id) return;
  if (view.dataset.id !== id || !view.children.length) {
    view.dataset.id = id;
    view.replaceChildren(
      ...["job_row", "job_next", "job_curve", "job_samples", "job_photos"].map(name => el("div", {id: name})),
      el(
        "details",
        {open: job.kind !== "train"},
        el("summary", {textContent: t("log")}),
        el("pre", {id: "job_log"}),
        el("pre", {id: "job_command"}),
      ),
    );
  }
  sync($("job_row"), [job], jobRow, rowShape);
  sync($("job_next"), [{id, done: job.state === "done", kind: job.kind}], next);
  if (job.losses.length > 1) sync($("job_curve"), [{id, points: job.losses}], losses);
  else $("job_curve").replaceChildren();
  sync(
    $("job_samples"),
    job.samples.length ? [{id: "title"}, ...job.samples.map(row => ({id: String(row.step), ...row}))] : [],
    strip,
  );
  sync($("job_photos"), job.photos ? [{id, url: job.photos}] : [], photos);
  const log = $("job_log"),
    text = job.lines.join("\n");
  if (log.textContent !== text) {
    log.textContent = text;
    log.scrollTop = log.scrollHeight;
  }
  $("job_command").textContent = `python dreambooth_implementation.py ${job.command}`;
}

const losses = entry => el("div", {}, heading("losses"), curve(entry.points), hint(t("losses_hint")));
const photos = entry => el("div", {}, heading("photos_seen"), sheet(entry.url));

const NEXT = {
  draw: ["#draw", "to_gallery"],
  compare: ["#compare", "to_comparisons"],
  export: ["#library", "to_library"],
}; // where to go from a job that is done; a training's own row has it

function next({done, kind}) {
  if (!done || !NEXT[kind]) return el("div");
  const [place, word] = NEXT[kind];
  return el("div", {className: "row"}, el("a", {className: "button", href: place, textContent: t(word), "data-action": word}));
}

function strip(row) {
  if (row.id === "title") return heading("samples");
  return el(
    "div",
    {className: "strip"},
    el("b", {textContent: row.step === null ? t("end") : row.step}),
    row.pictures.map(url => el("img", {src: url, loading: "lazy", alt: "", onclick: () => enlarge(url)})),
  );
}
