// What all parts of the page share: words, elements, requests, questions.

export const words = await (await fetch("/static/words.json")).json();
const asked = ((navigator.languages || [navigator.language])[0] || "en").toLowerCase();
export const language = localStorage.getItem("language") || (asked.startsWith("zh") ? "zh" : "en");

export function t(word, values = {}) {
  const text = words[word]?.[language] ?? word;
  return text.replace(/\{(\w+)\}/g, (whole, name) => values[name] ?? whole);
}

export const $ = id => document.getElementById(id);

// An element: properties by name, with those of data- and aria- as attributes; children are elements or text, never HTML.
export function el(tag, properties = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (value === undefined || value === null) continue;
    if (name.includes("-")) node.setAttribute(name, value);
    else node[name] = value;
  }
  node.append(...children.flat().filter(child => child !== null && child !== undefined && child !== false));
  return node;
}

// Children of `box` for `entries`, each with an id. One is built anew only if its `shape` changed; else its update() is called.
export function sync(box, entries, build, shape = entry => entry) {
  const known = new Map([...box.children].map(node => [node.dataset.id, node]));
  const nodes = entries.map(entry => {
    const key = JSON.stringify(shape(entry));
    let node = known.get(entry.id);
    if (!node || node.key !== key) {
      node = build(entry);
      node.dataset.id = entry.id;
      node.key = key;
    }
    node.update?.(entry);
    return node;
  });
  if (nodes.length !== box.children.length || nodes.some((node, i) => node !== box.children[i])) box.replaceChildren(...nodes);
}

let clock;
export function say(text, seconds = 8) {
  $("said").textContent = text;
  $("said").hidden = false;
  clearTimeout(clock);
  clock = setTimeout(() => {
    $("said").hidden = true;
  }, seconds * 1000);
}

// The answer of the server; null once what it refused was said. A question is asked, and the request made again with the answer.
async function answered(response, again) {
  const answer = await response.json();
  if (response.ok) return answer;
  if (answer.refused === "really_delete")
    return (await ask(t("really_delete", answer.details))) ? again(answer.details.id) : null;
  say(answer.refused === "program" ? answer.details.said : t(answer.refused, answer.details), 20);
  return null;
}

async function request(path, options, again) {
  try {
    return await answered(await fetch(path, options), again);
  } catch {
    say(t("page_ended"), 4);
    return null;
  }
}

export const look = (what, query = {}) => request(`/api/${what}?${new URLSearchParams(query)}`, {});

export async function act(action, values = {}) {
  const answer = await request(`/api/${action}`, {method: "POST", body: JSON.stringify(values)}, confirmed =>
    act(action, {...values, confirmed}),
  );
  if (answer) document.dispatchEvent(new Event("changed"));
  return answer;
}

export const bring = (what, file) =>
  request(`/api/${what}?${new URLSearchParams({name: file.name})}`, {method: "PUT", body: file});

function ask(text) {
  const dialog = $("ask");
  dialog.querySelector("p").textContent = text;
  dialog.showModal();
  return new Promise(resolve => {
    const end = answer => {
      dialog.close();
      resolve(answer);
    };
    $("ask_yes").onclick = () => end(true);
    $("ask_no").onclick = () => end(false);
    dialog.oncancel = () => resolve(false);
  });
}

export const hint = text => el("p", {className: "hint", textContent: text});
export const heading = word => el("h2", {textContent: t(word)});
export const sheet = (url, alt = "", onclick) => el("img", {src: url, className: "sheet", alt, loading: "lazy", onclick});

export function button(word, onclick, kind = "quiet") {
  return el("button", {type: "button", className: kind, textContent: t(word), onclick, "data-action": word});
}

// A labelled field: kinds are text, long, number, switch and choice (with `choices`, [value, text] each).
export function field(name, kind, {label, hint, choices, value, wide, placeholder} = {}) {
  const input =
    kind === "long"
      ? el("textarea", {rows: 2})
      : kind === "choice"
        ? el(
            "select",
            {},
            choices.map(([value, text]) => el("option", {value, textContent: text})),
          )
        : el("input", {type: {switch: "checkbox", number: "text"}[kind] || "text"});
  Object.assign(input, {name, placeholder: placeholder ?? ""});
  if (kind === "number") input.inputMode = "decimal";
  if (kind === "switch") input.checked = !!value;
  else if (value !== undefined) input.value = value;
  const text = el("span", {textContent: label ?? t(`field_${name}`)});
  const parts = kind === "switch" ? [input, text] : [text, input];
  return el("label", {className: wide ? "wide" : ""}, parts, hint ? el("span", {className: "hint", textContent: hint}) : null);
}

export function values(form) {
  const found = {};
  for (const input of form.elements) {
    if (input.name && !input.closest("[hidden]")) found[input.name] = input.type === "checkbox" ? input.checked : input.value;
  }
  return found;
}

export const date = seconds =>
  new Date(seconds * 1000).toLocaleString(language === "zh" ? "zh-CN" : "en", {dateStyle: "medium", timeStyle: "short"});

export function enlarge(url, ...below) {
  const dialog = $("large");
  dialog.replaceChildren(
    el("img", {src: url, alt: ""}),
    ...below,
    el(
      "div",
      {className: "row"},
      button("close", () => dialog.close()),
    ),
  );
  dialog.showModal();
}
