// One question answered three ways by the same decoder: from memories, from retrieved text, from whole texts.

import * as api from "./api.js";
import { bar, bytes, count, el, problem, rate, seconds, some, warning } from "./dom.js";
import { sourceList } from "./sources.js";

const METHODS = [
  ["lloco", "LLoCO", "reads the segments that the search finds"],
  ["text_retrieval", "Text retrieval", "reads the text of the same segments"],
  ["in_context", "In context", "reads the documents' whole text"],
];

const prompt = (costs) => (costs.slots ? `${count(costs.prompt_tokens)} + ${some(costs.slots, "slot")}` : some(costs.prompt_tokens, "token"));

const MEASURES = [
  ["Prompt", (costs) => costs.prompt_tokens + costs.slots, prompt, "tokens of text, and slots that stand for text"],
  ["First token", (costs) => costs.first_token_s, ({ first_token_s: time }) => seconds(time), "from the question to the first token"],
  ["Speed", (costs) => costs.tokens_per_s, ({ tokens_per_s: speed }) => rate(speed), "tokens written a second"],
  ["Memory", (costs) => costs.memory_bytes, ({ memory_bytes: size }) => bytes(size), "the most that the server's process has held so far"],
];

class Column {
  constructor(method, name, what) {
    this.method = method;
    this.text = el("p.answer.small", { dir: "auto" });
    this.live = el("div.live", { "aria-live": "polite", "aria-busy": "true" }, el("p.waiting", {}, "Waiting"));
    this.measures = el("dl.measures");
    this.costs = null;
    this.node = el(`section.column.${method}`, { "aria-label": name }, el("h3", {}, name), el("p.soft", {}, what), this.live, this.measures);
  }

  write(piece) {
    if (!this.text.isConnected) this.live.replaceChildren(this.text);
    this.text.append(piece);
  }

  finish(final) {
    this.live.setAttribute("aria-busy", "false");
    if (final.error) return this.live.replaceChildren(problem(final.error));
    if (!final.answer) this.live.replaceChildren(el("p.soft", {}, "The decoder ended its answer at once."));
    this.costs = final;
    this.live.append(...final.warnings.map(warning));
  }
}

/** The measures of every column that has them, each bar beside the largest of its kind. */
function measure(columns) {
  const done = columns.filter((column) => column.costs);
  for (const column of done) {
    column.measures.replaceChildren(...MEASURES.map(([name, of, say, what]) => {
      const largest = Math.max(...done.map((other) => of(other.costs)));
      return el("div", { title: what }, el("dt", {}, name), el("dd", {}, bar(of(column.costs) / largest), el("span", {}, say(column.costs))));
    }));
  }
}

export async function beside(turn, asked, signal) {
  const columns = METHODS.map((method) => new Column(...method));
  turn.classList.add("wide");
  turn.append(el("div.columns", {}, ...columns.map((column) => column.node)));
  try {
    for await (const [method, record] of api.compare(asked, signal)) {
      const column = columns.find((one) => one.method === method);
      if (!column) continue;
      if (record.delta !== undefined) column.write(record.delta);
      else {
        column.finish(record.final);
        measure(columns);
      }
    }
    if (columns[0].costs) turn.append(sourceList(columns[0].costs.sources));
  } catch (error) {
    turn.append(error.name === "AbortError" ? el("p.soft", {}, "Stopped.") : problem(error));
  } finally {
    for (const column of columns) {
      column.live.setAttribute("aria-busy", "false");
      column.live.querySelector(".waiting")?.replaceWith(el("p.soft", {}, "No answer."));
    }
  }
}
