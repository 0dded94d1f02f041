// What the server is asked, and nothing of the page.

/** The server answered with an error; `message` is its own. */
export class Refused extends Error {
  constructor(status, message, retryAfter = 0) {
    super(message);
    this.status = status;
    this.retryAfter = retryAfter;
  }
}

/** No answer came, or it broke off. */
export class Unreachable extends Error {}

const KEY = "lloco-key";
const BROKE = "The connection to the server broke off.";
const DONE = {}; // what the API ends a stream with
const AGAIN_MS = [150, 300, 600, 1000]; // between looks at a file that is being compressed

export const key = {
  get: () => sessionStorage.getItem(KEY) ?? "",
  set: (value) => sessionStorage.setItem(KEY, value),
  forget: () => sessionStorage.removeItem(KEY),
};

let asking = null;
let askForKey = async () => false;

/** `ask(problem)` gets a key from the reader and tells whether there is one. */
export function whenKeyIsNeeded(ask) {
  askForKey = ask;
}

async function refusal(response) {
  const text = await response.text().catch(() => "");
  let message = text.slice(0, 300) || response.statusText;
  try {
    const { error, detail } = JSON.parse(text);
    message = error?.message ?? (typeof detail === "string" ? detail : message);
  } catch { /* not JSON: what it says, as it says it */ }
  return new Refused(response.status, message, Number(response.headers.get("Retry-After")) || 0);
}

/** One request; asks for the key once where the server wants one. Requests side by side ask for it together. */
async function send(path, { method = "GET", json, form, signal } = {}) {
  for (;;) {
    const used = key.get();
    const headers = used ? { Authorization: `Bearer ${used}` } : {};
    if (json !== undefined) headers["Content-Type"] = "application/json";
    let response;
    try {
      response = await fetch(path, { method, headers, signal, body: json === undefined ? form : JSON.stringify(json) });
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new Unreachable("The server cannot be reached.");
    }
    if (response.ok) return response;
    const refused = await refusal(response);
    if (response.status !== 401) throw refused;
    if (used !== key.get()) continue; // another request has got a new one meanwhile
    asking ??= askForKey(used ? refused.message : "").finally(() => { asking = null; });
    if (!(await asking)) throw refused;
  }
}

const get = async (path, options) => (await send(path, options)).json();

/** The events of a stream of server-sent events, as `[name, data]`. */
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      const blocks = (rest + value).split(/\r?\n\r?\n/);
      rest = blocks.pop();
      for (const block of blocks) {
        let name = "message";
        const data = [];
        for (const line of block.split(/\r?\n/)) {
          if (line.startsWith("event:")) name = line.slice(6).trim();
          else if (line.startsWith("data:")) data.push(line.slice(5).replace(/^ /, ""));
        }
        if (data.length) yield [name, data.join("\n")];
      }
    }
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Unreachable(BROKE);
  } finally {
    reader.cancel().catch(() => {});
  }
}

/** The records of a stream as `[name, record]`; one that says an error is raised. */
async function* records(path, json, signal) {
  for await (const [name, data] of events(await send(path, { method: "POST", json, signal }))) {
    const record = data === "[DONE]" ? DONE : JSON.parse(data);
    if (record.error) throw new Refused(500, record.error.message ?? String(record.error));
    yield [name, record];
  }
}

/** An answer as it is written: `{text}` piece by piece, then `{lloco}` with sources, warnings and usage. */
export async function* answer(body, signal) {
  const json = { ...body, stream: true, stream_options: { include_usage: true } };
  for await (const [, chunk] of records("/v1/chat/completions", json, signal)) {
    if (chunk === DONE) return;
    const [choice] = chunk.choices ?? [];
    yield { text: choice?.delta?.content ?? "", finish: choice?.finish_reason ?? "", lloco: chunk.lloco ?? null };
  }
  throw new Unreachable(BROKE);
}

/** Three answers as they are written: `[method, {delta}]` piece by piece, then `[method, {final}]` for each. */
export async function* compare(body, signal) {
  for await (const [method, record] of records("/lloco/compare", body, signal)) {
    if (method === "done") return;
    yield [method, record];
  }
  throw new Unreachable(BROKE);
}

const inPath = encodeURIComponent;
const pause = (ms) => new Promise((done) => setTimeout(done, ms));

/** The models that answer. */
export const models = async () => (await get("/v1/models")).data.filter((model) => !model.id.endsWith("-embeddings"));
export const store = () => get("/lloco/store");
export const documents = async () => (await get("/lloco/documents")).data;
export const remove = (id) => send(`/lloco/documents/${inPath(id)}`, { method: "DELETE" });
export const text = (id, start, end) => get(`/lloco/documents/${inPath(id)}/text?start=${start}&end=${end}`);
export const groups = async () => (await get("/v1/vector_stores?limit=100")).data;
export const forgetFile = (id) => send(`/v1/files/${inPath(id)}`, { method: "DELETE" });

/** Sends a file; its id. */
export async function sendFile(file, signal) {
  const form = new FormData();
  form.append("purpose", "assistants");
  form.append("file", file, file.name);
  return (await get("/v1/files", { method: "POST", form, signal })).id;
}

/** The id of the group of a name, which is made where there is none. */
export async function groupOf(name) {
  if (!name) return "default";
  const there = (await groups()).find((group) => group.name === name || group.id === name);
  return (there ?? await get("/v1/vector_stores", { method: "POST", json: { name } })).id;
}

const attached = (group) => `/v1/vector_stores/${inPath(group)}/files`;

export const attach = (id, group) => get(attached(group), { method: "POST", json: { file_id: id } });

/** Follows a file's compression to its end; `follow` gets each status as it comes. */
export async function followed(id, group, follow, signal) {
  for (let turn = 0; ; turn += 1) {
    const status = await get(`${attached(group)}/${inPath(id)}`, { signal });
    if (status.status === "completed") return;
    if (status.status !== "in_progress") throw new Refused(422, status.last_error?.message ?? `It was ${status.status}.`);
    follow(status);
    await pause(AGAIN_MS[Math.min(turn, AGAIN_MS.length - 1)]);
  }
}

/** Files that are being compressed, whoever sent them: `{id, group, name}`. */
export async function underWay() {
  const lists = await Promise.all((await groups()).map(async ({ id: group }) =>
    (await get(`${attached(group)}?filter=in_progress&limit=100`)).data.map(({ id }) => ({ id, group }))));
  return Promise.all(lists.flat().map(async (one) => ({ ...one, name: (await get(`/v1/files/${inPath(one.id)}`)).filename })));
}
