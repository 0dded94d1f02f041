// Elements and numbers. Texts that come from documents, names and answers enter the page as text nodes only.

export const $ = (id) => document.getElementById(id);

const SVG = "http://www.w3.org/2000/svg";

/** An element with attributes, listeners (`onclick`) and children; strings become text nodes, null is left out. */
export function el(name, attributes = {}, ...children) {
  const [tag, ...classes] = name.split(".");
  const made = document.createElement(tag || "div");
  if (classes.length) made.className = classes.join(" ");
  for (const [key, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (key.startsWith("on")) made.addEventListener(key.slice(2), value);
    else made.setAttribute(key, value === true ? "" : value);
  }
  made.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return made;
}

/** A 24 by 24 icon of one path. */
export function icon(path) {
  const svg = document.createElementNS(SVG, "svg");
  svg.setAttribute("viewBox", "0 0 24 24");
  svg.setAttribute("aria-hidden", "true");
  const line = document.createElementNS(SVG, "path");
  line.setAttribute("d", path);
  svg.append(line);
  return svg;
}

/** A bar filled to `share` of its width; its number stands beside it, so it is hidden from screen readers. */
export function bar(share, kind = "") {
  const fill = el("i");
  fill.style.width = `${Math.max(0, Math.min(1, share || 0)) * 100}%`;
  return el(`span.bar${kind && `.${kind}`}`, { "aria-hidden": "true" }, fill);
}

const whole = new Intl.NumberFormat("en");
const short = new Intl.NumberFormat("en", { maximumSignificantDigits: 3 });

export const count = (number) => whole.format(Math.round(number));

export const some = (number, one, many = `${one}s`) => `${count(number)} ${number === 1 ? one : many}`;

export function bytes(number) {
  const units = ["bytes", "kB", "MB", "GB", "TB"];
  let at = 0;
  for (; number >= 1000 && at < units.length - 1; at += 1) number /= 1000;
  return `${at ? short.format(number) : count(number)} ${units[at]}`;
}

export function seconds(number) {
  if (number < 1) return `${count(number * 1000)} ms`;
  if (number < 120) return `${short.format(number)} s`;
  return `${count(number / 60)} min`;
}

export const rate = (number) => `${number ? short.format(number) : "–"} tokens/s`;

export function day(iso) {
  const date = new Date(iso);
  return Number.isNaN(date.valueOf()) ? "" : date.toLocaleDateString("en-GB", { day: "numeric", month: "short", year: "numeric" });
}

export const warning = (text) => el("p.note", { dir: "auto" }, text);

export function problem(error) {
  const wait = error.retryAfter ? ` Try again in ${some(error.retryAfter, "second")}.` : "";
  return el("p.problem", { role: "alert" }, (error.message ?? error) + wait);
}

/** Said to those who listen, and shown to nobody. */
export function say(text) {
  $("spoken").textContent = text;
}

/** A part of a text by the server's characters, which are code points, not UTF-16 units. */
export function cut(text, start, end) {
  return Array.from(text).slice(Math.max(0, start), end === undefined ? undefined : Math.max(0, end)).join("");
}

export const length = (text) => Array.from(text).length;

/** Opens a dialog and comes back when it is closed; Escape, the buttons that close and a click beside it close it. */
export function show(dialog) {
  return new Promise((done) => {
    const close = (event) => {
      if (event.target === dialog || event.target.closest("[data-close]")) dialog.close();
    };
    dialog.addEventListener("click", close);
    dialog.addEventListener("close", () => {
      dialog.removeEventListener("click", close);
      done(dialog.returnValue);
    }, { once: true });
    dialog.returnValue = "";
    dialog.showModal();
  });
}
