// Before the first paint: the theme that was chosen, else that of the system.
"use strict";
(() => {
  try {
    const chosen = localStorage.getItem("lloco-theme");
    if (chosen === "light" || chosen === "dark") document.documentElement.dataset.theme = chosen;
  } catch { /* a browser that keeps nothing has the system's theme */ }
})();
