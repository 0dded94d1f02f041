// Files on their way into the store, one after another: sent, then compressed by the server in the background.

import * as api from "./api.js";
import { $, bytes, count, el, icon, problem, say, some } from "./dom.js";

let changed = async () => {};
let largest = Infinity;
let last = Promise.resolve();

class Upload {
  constructor(name) {
    this.name = name;
    this.id = null; // the server's, once the file is there
    this.state = el("span.soft", {}, "Waiting");
    this.progress = el("progress", { max: 1, "aria-label": `Progress of ${name}` });
    this.stop = new AbortController();
    const close = el("button.quiet.icon", { type: "button", "aria-label": `Cancel ${name}`, onclick: () => this.cancel() }, icon("M6 6l12 12M18 6L6 18"));
    this.node = el("li.upload", {}, el("div.upload-name", {}, el("strong", { dir: "auto" }, name), this.state), close, this.progress);
    $("uploads").append(this.node);
  }

  get cancelled() {
    return this.stop.signal.aborted;
  }

  /** Take it out, here and on the server. */
  cancel() {
    this.stop.abort();
    this.node.remove();
    $("list-title").focus();
    if (this.id) api.forgetFile(this.id).then(changed, () => {});
  }

  async send(file, groupName) {
    if (file.size > largest) throw new Error(`A file may have at most ${bytes(largest)}; this one has ${bytes(file.size)}.`);
    this.state.textContent = `Sending ${bytes(file.size)}`;
    this.id = await api.sendFile(file, this.stop.signal);
    const group = await api.groupOf(groupName);
    await api.attach(this.id, group);
    return group;
  }

  show({ lloco }) {
    const { segments_done: done, segments_total: total } = lloco ?? {};
    if (total) this.progress.value = done / total;
    this.state.textContent = total ? `Compressing, ${count(done)} of ${some(total, "segment")}` : "Reading";
  }

  async run(toGroup) {
    try {
      const group = await toGroup();
      this.state.textContent = "Reading";
      await api.followed(this.id, group, (status) => this.show(status), this.stop.signal);
      this.node.remove();
      say(`${this.name} is in the store.`);
    } catch (error) {
      if (this.cancelled) return;
      this.progress.remove();
      this.state.replaceWith(problem(error));
    }
    await changed();
  }
}

function take(files) {
  const groupName = $("group").value.trim();
  for (const file of files) {
    const upload = new Upload(file.name);
    last = last.then(() => upload.cancelled || upload.run(() => upload.send(file, groupName)));
  }
}

/** Show what is being compressed already: sent before the page was loaded, or by somebody else. */
export async function resume() {
  for (const { id, group, name } of await api.underWay()) {
    const upload = new Upload(name);
    upload.id = id;
    upload.run(async () => group);
  }
}

export function limits(store) {
  largest = store.max_upload_bytes ?? Infinity;
}

export function start(whenChanged) {
  changed = whenChanged;
  $("files").addEventListener("change", (event) => {
    take([...event.target.files]);
    event.target.value = "";
  });
  const drop = $("drop");
  const hasFiles = (event) => [...(event.dataTransfer?.types ?? [])].includes("Files");
  const over = (yes) => drop.classList.toggle("over", yes);
  for (const name of ["dragenter", "dragover"]) {
    window.addEventListener(name, (event) => {
      if (!hasFiles(event)) return;
      event.preventDefault(); // a file that is dropped beside the field must not replace the page
      over(!drop.hidden);
    });
  }
  window.addEventListener("dragleave", (event) => { if (!event.relatedTarget) over(false); });
  window.addEventListener("drop", (event) => {
    if (!hasFiles(event)) return;
    event.preventDefault();
    over(false);
    if (!$("page-documents").hidden && !drop.hidden) take([...event.dataTransfer.files]);
  });
}
