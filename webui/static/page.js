// The page: its words, its tabs, and a look at the library every second.

import {$, language, look, t} from "./common.js";
import * as compare from "./compare.js";
import * as draw from "./draw.js";
import {isAtWork, link, progressText, showJob} from "./jobs.js";
import {showLibrary} from "./library.js";
import * as train from "./train.js";

const TABS = ["train", "library", "draw", "compare"];
let state = null,
  chosen = null;

function fillWords() {
  document.documentElement.lang = language === "zh" ? "zh-CN" : "en";
  for (const node of document.querySelectorAll("[data-word]")) node.textContent = t(node.dataset.word);
  $("language").textContent = t("other_language");
  $("language").onclick = () => {
    localStorage.setItem("language", language === "zh" ? "en" : "zh");
    location.reload();
  };
}

function route() {
  const [name, id] = location.hash.slice(1).split("/", 2);
  return {tab: TABS.includes(name) || name === "job" ? name : "train", id: id && decodeURIComponent(id)};
}

function show() {
  const {tab, id} = route();
  for (const name of [...TABS, "job"]) $(`view_${name}`).hidden = name !== tab;
  for (const anchor of document.querySelectorAll("nav a")) anchor.classList.toggle("here", anchor.hash === `#${tab}`);
  if (!state) return;
  const working = state.jobs.find(isAtWork);
  $("at_work").hidden = !working;
  if (working) {
    $("at_work").href = link(working.id);
    $("at_work").textContent = `${t(`kind_${working.kind}`)}: ${working.title} · ${progressText(working)}`;
  }
  document.title = working?.training?.total
    ? `${Math.floor((100 * working.training.done) / working.training.total)} % · DreamBooth`
    : "DreamBooth";
  if (tab === "train") train.showLine(state);
  if (tab === "library") showLibrary(state);
  if (tab === "draw") draw.showDraw(state);
  if (tab === "compare") compare.showCompare(state);
  if (tab === "job" && id) showJob(id);
  if (tab === "draw" && id && chosen !== location.hash) {
    chosen = location.hash;
    draw.choose(id);
  }
}

let asking = false;
async function tick() {
  if (asking) return;
  asking = true;
  const now = await look("state");
  asking = false;
  if (now) {
    state = now;
    show();
  }
}

fillWords();
show();
draw.start();
compare.start();
await train.start();
addEventListener("hashchange", () => {
  if (route().tab !== "draw") chosen = null;
  show();
});
document.addEventListener("changed", tick);
setInterval(() => {
  if (!document.hidden) tick();
}, 1000);
document.addEventListener("visibilitychange", tick);
await tick();
document.body.dataset.ready = "yes";
