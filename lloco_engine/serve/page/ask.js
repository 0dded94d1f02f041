// The question, its answer as it is written, and the conversation they become.

import * as api from "./api.js";
import { beside } from "./beside.js";
import { $, el, problem, rate, say, seconds, some, warning } from "./dom.js";
import { sourceList } from "./sources.js";

const conversation = []; // turns as the API writes them
let running = null; // stops the answer that is being written

const settings = () => {
  const number = (id) => ($(id).value ? Number($(id).value) : undefined);
  return {
    whole_document: $("reads").value || undefined,
    top_k: number("top-k"),
    max_new_tokens: number("longest"),
  };
};

/** The adapter that a model's name stands for, `lloco:ADAPTER`; none: the one that fits. */
const adapter = () => $("model").value.split(":")[1];

function costs(usage) {
  const parts = [
    usage.slots
      ? `${some(usage.slots, "slot")} in place of ${some(usage.source_tokens, "token")}`
      : "no memory was read",
    `${some(usage.prompt_tokens, "token")} of text`,
    `first token ${seconds(usage.first_token_s)}`,
  ];
  if (usage.tokens_per_s) parts.push(rate(usage.tokens_per_s));
  return el("p.costs", {}, parts.join(" · "));
}

/** Writes the answer to a question under `turn`. */
async function answer(turn, question, signal) {
  const text = el("p.answer", { dir: "auto" });
  const live = el("div.live", { "aria-live": "polite", "aria-busy": "true" }, el("p.waiting", {}, "Finding what it stands on"));
  turn.append(live);
  const messages = [...conversation, { role: "user", content: question }];
  let written = "";
  let ending = null;
  let cutOff = false;
  try {
    for await (const chunk of api.answer({ model: $("model").value || "lloco", ...settings(), messages }, signal)) {
      if (chunk.text) {
        if (!written) live.replaceChildren(text);
        written += chunk.text;
        text.append(chunk.text);
      }
      cutOff ||= chunk.finish === "length";
      ending = chunk.lloco ?? ending;
    }
    if (!written) live.replaceChildren(el("p.soft", {}, "The decoder ended its answer at once."));
    if (cutOff) live.append(el("p.soft", {}, "Cut off at the longest answer that is allowed."));
  } catch (error) {
    if (!written) live.replaceChildren();
    turn.append(error.name === "AbortError" ? el("p.soft", {}, "Stopped.") : problem(error));
  } finally {
    live.setAttribute("aria-busy", "false");
  }
  if (written) conversation.push(messages.at(-1), { role: "assistant", content: written });
  if (!ending) return;
  if (ending.reasoning) live.before(el("details.thoughts", {}, el("summary", {}, "Thoughts"), el("p", { dir: "auto" }, ending.reasoning)));
  turn.append(...ending.warnings.map(warning), costs(ending.usage), sourceList(ending.sources));
  say(`Answered, with ${some(ending.sources.length, "source")}.`);
}

async function ask(question) {
  const mode = new FormData($("question-form")).get("mode");
  const turn = el("article.turn", {}, el("h2.question", { dir: "auto" }, question));
  $("welcome").hidden = true;
  $("turns").append(turn);
  running = new AbortController();
  busy(true);
  turn.scrollIntoView({ block: "start" });
  try {
    await (mode === "beside" ? beside(turn, { question, adapter: adapter(), ...settings() }, running.signal) : answer(turn, question, running.signal));
  } finally {
    running = null;
    busy(false);
    $("new-conversation").hidden = false;
  }
}

function busy(yes) {
  const focused = document.activeElement === $("send") || document.activeElement === $("stop");
  $("send").hidden = yes;
  $("stop").hidden = !yes;
  if (focused) $(yes ? "stop" : "question").focus();
}

function fit() {
  const field = $("question");
  field.style.height = "auto";
  field.style.height = `${Math.min(field.scrollHeight, 200)}px`;
}

function openSettings(open) {
  $("settings").hidden = !open;
  $("settings-toggle").setAttribute("aria-expanded", String(open));
}

/** What may be chosen in the settings, which changes with the store. */
export function choices(models, documents) {
  const fill = (select, first, options) => {
    const before = select.value;
    select.replaceChildren(...first, ...options);
    if ([...select.options].some((option) => option.value === before)) select.value = before;
  };
  fill($("model"), [], models.map((model) => el("option", { value: model.id }, model.id)));
  fill($("reads"), [el("option", { value: "" }, "what the search finds")],
    documents.map((document) => el("option", { value: document.id }, `all of ${document.title || document.id}`)));
}

export function welcome(store) {
  $("welcome-lead").replaceChildren(...(store.documents
    ? [`${some(store.documents, "document")}: ${some(store.tokens, "token")} of text, held in ${some(store.slots, "slot")} that the decoder reads in their place.`]
    : ["The store is empty. ", el("a", { href: "#/documents" }, "Add a document"), " to begin."]));
}

export function start() {
  $("question-form").addEventListener("submit", (event) => {
    event.preventDefault();
    const question = $("question").value.trim();
    if (!question || running) return;
    $("question").value = "";
    fit();
    if (matchMedia("(max-width: 44rem)").matches) openSettings(false); // they would hide the answer
    ask(question);
  });
  $("question").addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    $("question-form").requestSubmit();
  });
  $("question").addEventListener("input", fit);
  $("stop").addEventListener("click", () => running?.abort());
  $("settings-toggle").addEventListener("click", () => openSettings($("settings").hidden));
  $("new-conversation").addEventListener("click", () => {
    running?.abort();
    conversation.length = 0;
    $("turns").replaceChildren();
    $("welcome").hidden = false;
    $("new-conversation").hidden = true;
    $("question").focus();
  });
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape" && running && !document.querySelector("dialog[open]")) running.abort();
  });
}
