// The page: which part of it is shown, the theme, the key, and whether the server is there.

import * as api from "./api.js";
import * as ask from "./ask.js";
import * as documents from "./documents.js";
import { $, el, show } from "./dom.js";
import * as uploads from "./uploads.js";

const PAGES = ["ask", "documents"];
const THEMES = { "": "of the system", light: "light", dark: "dark" };
const AGAIN_MS = 3000;

// -- which part is shown ------------------------------------------------------------------------------------------

function route() {
  const [, wanted] = /^#\/(\w+)/.exec(location.hash) ?? [];
  if (!wanted && location.hash) return; // a place on this page, such as the skip link's
  const page = PAGES.includes(wanted) ? wanted : "ask";
  for (const name of PAGES) $(`page-${name}`).hidden = name !== page;
  for (const link of document.querySelectorAll("nav a")) {
    if (link.dataset.page === page) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  document.title = page === "ask" ? "LLoCO" : "Documents · LLoCO";
  if (page === "ask" && matchMedia("(pointer: fine)").matches) $("question").focus();
}

// -- the theme ----------------------------------------------------------------------------------------------------

function setTheme(theme) {
  if (theme) document.documentElement.dataset.theme = theme;
  else delete document.documentElement.dataset.theme;
  $("theme").setAttribute("aria-label", `Theme: ${THEMES[theme]}`);
  $("theme").title = `Theme: ${THEMES[theme]}`;
}

function nextTheme() {
  const names = Object.keys(THEMES);
  const theme = names[(names.indexOf(document.documentElement.dataset.theme ?? "") + 1) % names.length];
  setTheme(theme);
  try {
    localStorage.setItem("lloco-theme", theme);
  } catch { /* it lasts until the page is left */ }
}

// -- the key ------------------------------------------------------------------------------------------------------

async function askForKey(problem) {
  $("key-problem").hidden = !problem;
  $("key-problem").textContent = problem;
  $("key-field").value = "";
  if ((await show($("key"))) !== "used") return false;
  api.key.set($("key-field").value.trim());
  $("key-field").value = "";
  $("key-change").hidden = false;
  return true;
}

// -- what the server has ------------------------------------------------------------------------------------------

let again = 0;

/** Shows what the server has now; the store's totals, null where the server gives none. */
async function refresh() {
  clearTimeout(again);
  try {
    const [store, listed, models, groups] = await Promise.all([api.store(), api.documents(), api.models(), api.groups()]);
    $("offline").hidden = true;
    ask.welcome(store);
    ask.choices(models, listed);
    documents.showStore(store);
    documents.showDocuments(listed, groups);
    uploads.limits(store);
    $("groups").replaceChildren(...groups.filter(({ id }) => id !== "default").map(({ id, name }) => el("option", { value: name || id })));
    return store;
  } catch (error) {
    if (error instanceof api.Unreachable) {
      $("offline").hidden = false;
      $("offline").textContent = `${error.message} Trying again.`;
      again = setTimeout(refresh, AGAIN_MS);
    } else {
      $("welcome-lead").textContent = error.message;
      documents.showProblem(error);
    }
    return null;
  }
}

setTheme(document.documentElement.dataset.theme ?? "");
$("theme").addEventListener("click", nextTheme);
$("key-change").hidden = !api.key.get();
$("key-change").addEventListener("click", async () => { if (await askForKey("")) refresh(); });
$("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  $("key").close("used");
});
api.whenKeyIsNeeded(askForKey);
window.addEventListener("hashchange", route);
window.addEventListener("online", refresh);
window.addEventListener("offline", refresh);
ask.start();
documents.start(refresh);
route();
uploads.start(refresh);
refresh().then((store) => store?.in_progress && uploads.resume());
