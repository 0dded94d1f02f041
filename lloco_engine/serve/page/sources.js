// What an answer stands on: a card for each source, and the document's text around it, opened.

import * as api from "./api.js";
import { $, bar, count, cut, el, icon, length, problem, show, some } from "./dom.js";

const AROUND = 90; // characters of the surroundings that a card shows before the quote
const MORE = 1500; // characters that the reading dialog shows on each side, and reads more at a time

const nameOf = (source) => source.title || source.document;

function where(source) {
  const page = source.page ? `page ${source.page}, ` : "";
  return `${page}characters ${count(source.start)} to ${count(source.end)}`;
}

/** The quote within its surroundings, the quote marked; surroundings are one text that has it in it. */
function marked(before, quote, after) {
  return [before, el("mark", {}, quote), after];
}

function excerpt(source) {
  const from = source.start - source.text_start;
  const before = cut(source.text, Math.max(0, from - AROUND), from);
  const end = from + source.end - source.start;
  const after = cut(source.text, end, end + 4 * AROUND);
  return el("p.quote", { dir: "auto" }, ...marked((from > AROUND ? "… " : "") + before, source.quote, after));
}

/** The sources of an answer, best first. */
export function sourceList(found) {
  if (!found.length) return el("p.soft", {}, "No source was found: the answer stands on nothing in the store.");
  return el("section", { "aria-label": "Sources" },
    el("h3", {}, some(found.length, "source")),
    el("ol.cards", { role: "list" }, ...found.map((source, at) => card(source, at + 1))));
}

/** A card of a source; it opens the document there. */
function card(source, number) {
  const title = el("h4", { dir: "auto" }, nameOf(source));
  const open = el("button.quiet.card-open", { type: "button", onclick: () => read(source) }, "Read around it");
  open.setAttribute("aria-label", `Read around source ${number}, ${nameOf(source)}`);
  const score = el("p.score", { title: "How well it fits the question, at most 1" },
    bar(source.score, "thin"), el("span", {}, el("span.unseen", {}, "score "), source.score.toFixed(2)));
  return el("li.card", {},
    el("div.card-head", {}, el("span.number", { "aria-hidden": "true" }, String(number)), title, score),
    excerpt(source),
    el("div.card-foot", {}, el("span.soft", {}, source.page ? `Page ${source.page}` : where(source)), open));
}

/** Shows the document around a source, with more of it on each side as it is asked for. */
async function read(source) {
  const dialog = $("reading");
  const body = $("reading-body");
  $("reading-title").textContent = nameOf(source);
  $("reading-where").textContent = [source.document !== nameOf(source) && source.document, where(source)].filter(Boolean).join(" · ");
  body.replaceChildren(el("p.loading", {}, "Reading …"));
  const closed = show(dialog);
  const stretch = el("div.stretch", { dir: "auto" }, el("mark", { tabindex: "-1" }, source.quote));
  const quote = stretch.firstChild;
  const span = { start: source.start, end: source.end };

  const grow = async (back) => {
    const [from, to] = back ? [Math.max(0, span.start - MORE), span.start] : [span.end, span.end + MORE];
    const part = await api.text(source.document, from, to);
    const height = body.scrollHeight;
    if (back) {
      stretch.prepend(part.text);
      span.start = from;
      body.scrollTop += body.scrollHeight - height; // what was read stays where it was
    } else {
      stretch.append(part.text);
      span.end += length(part.text);
    }
    earlier.hidden = span.start === 0;
    later.hidden = back ? later.hidden : span.end >= part.length;
  };
  const button = (label, path, back) => {
    const made = el("button.quiet.more", { type: "button", onclick: async () => {
      made.disabled = true;
      await grow(back).catch((error) => made.before(problem(error)));
      made.disabled = false;
    } }, icon(path), label);
    return made;
  };
  const earlier = button("Earlier", "M6 15l6-6 6 6", true);
  const later = button("Later", "M6 9l6 6 6-6", false);
  try {
    await grow(true);
    await grow(false);
    body.replaceChildren(earlier, stretch, later);
    quote.scrollIntoView({ block: "center" });
  } catch (error) {
    body.replaceChildren(problem(error), el("p.quote", { dir: "auto" }, el("mark", {}, source.quote)));
  }
  await closed;
}
