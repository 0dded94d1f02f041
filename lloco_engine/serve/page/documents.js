// What the store holds and costs, and documents on their way out of it.

import * as api from "./api.js";
import { $, bar, bytes, count, day, el, icon, problem, say, seconds, show, some } from "./dom.js";

const SHOWN = 100; // documents listed at once

let all = [];
let groupNames = new Map();
let rows = new Map(); // what is listed, by what is said of it: a row that is the same stays, and so does the focus in it
let shown = SHOWN;
let readOnly = false;
let changed = async () => {};

const nameOf = (document) => document.title || document.source || document.id;

// -- the store ----------------------------------------------------------------------------------------------------

const fact = (number, what) => el("div", {}, el("dd", {}, number), el("dt", {}, what));

const against = (what, share, number, kind) => el("div", {}, el("dt", {}, what), el("dd", {}, bar(share, kind), el("span", {}, number)));

export function showStore(store) {
  readOnly = store.read_only;
  $("drop").hidden = readOnly;
  if (store.suffixes?.length) $("files").accept = store.suffixes.join(",");
  if (!store.documents) return $("store").replaceChildren();
  const facts = [
    fact(`${store.tokens_per_slot.toFixed(1)} ×`, "fewer to read"),
    fact(bytes(store.bytes), "of memories on disk"),
    fact(bytes(store.bytes_per_token), "a token of text"),
    fact(seconds(store.compress_s), "of compressing, once"),
  ];
  $("store").replaceChildren(
    el("h2", {}, `${some(store.documents, "document")} in ${some(store.segments, "segment")}`),
    el("dl.measures.against", {},
      against("Their text", 1, some(store.tokens, "token"), ""),
      against("What is read", store.slots / store.tokens, some(store.slots, "slot"), "own")),
    el("dl.facts", {}, ...facts),
    el("p.soft", {}, `Read by ${store.decoder}, whose window holds ${some(store.window, "token")}.`));
}

// -- the list -----------------------------------------------------------------------------------------------------

async function remove(document, row) {
  const dialog = $("confirm");
  $("confirm-title").textContent = `Delete “${nameOf(document)}”?`;
  $("confirm-text").textContent = `Its memory of ${some(document.segments, "segment")} goes with it. Compressing it took ${seconds(document.compress_s)}.`;
  $("confirm-yes").onclick = () => dialog.close("yes");
  if ((await show(dialog)) !== "yes") return;
  row.setAttribute("aria-busy", "true");
  try {
    await api.remove(document.id);
    say(`Deleted ${nameOf(document)}.`);
    await changed();
    $("list-title").focus();
  } catch (error) {
    row.removeAttribute("aria-busy");
    row.append(problem(error));
  }
}

function row(document) {
  const name = nameOf(document);
  const group = document.vector_store_id === "default" ? "" : groupNames.get(document.vector_store_id) || document.vector_store_id;
  const about = [document.source !== name && document.source, document.pages && some(document.pages, "page"), group, day(document.added)];
  const costs = [
    ["tokens → slots", `${count(document.tokens)} → ${count(document.slots)}`],
    ["on disk", bytes(document.bytes)],
    ["compressed in", seconds(document.compress_s)],
  ];
  const made = el("li.document", {},
    el("div.document-name", {}, el("h3", { dir: "auto" }, name), el("p.soft", { dir: "auto" }, about.filter(Boolean).join(" · "))),
    el("dl.document-costs", {}, ...costs.map(([what, number]) => el("div", {}, el("dt", {}, what), el("dd", {}, number)))));
  if (!readOnly) {
    made.append(el("button.quiet.icon", { type: "button", "aria-label": `Delete ${name}`, onclick: () => remove(document, made) },
      icon("M5 7h14M10 7V4.5h4V7M7 7l1 13h8l1-13M10.5 11v5.5M13.5 11v5.5")));
  }
  return made;
}

function rowOf(document) {
  const said = JSON.stringify([document, readOnly, groupNames.get(document.vector_store_id)]);
  return [said, rows.get(said) ?? row(document)];
}

function list() {
  const wanted = $("find").value.trim().toLowerCase();
  const found = all.filter((document) => `${document.title} ${document.source} ${document.id}`.toLowerCase().includes(wanted));
  $("find-row").hidden = all.length < 8;
  $("list-head").hidden = !all.length;
  const box = $("documents");
  box.setAttribute("aria-busy", "false");
  if (!all.length) return box.replaceChildren(el("p.empty", {}, "Nothing here yet. What you add is listed with what it costs."));
  if (!found.length) return box.replaceChildren(el("p.empty", {}, "No document has this in its name."));
  const focused = document.activeElement;
  rows = new Map(found.slice(0, shown).map(rowOf));
  box.replaceChildren(el("ul.documents", {}, ...rows.values()));
  if (box.contains(focused)) focused.focus({ preventScroll: true });
  if (found.length > shown) {
    box.append(el("button.more", { type: "button", onclick: () => { shown += SHOWN; list(); } }, `Show more of ${count(found.length)}`));
  }
}

export function showDocuments(documents, groups) {
  all = documents;
  groupNames = new Map(groups.map(({ id, name }) => [id, name]));
  $("count").textContent = documents.length ? count(documents.length) : "";
  list();
}

export function showProblem(error) {
  $("documents").setAttribute("aria-busy", "false");
  $("documents").replaceChildren(problem(error));
}

export function start(whenChanged) {
  changed = whenChanged;
  $("find").addEventListener("input", () => { shown = SHOWN; list(); });
}
