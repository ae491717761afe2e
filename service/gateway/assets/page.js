// The page at `/`: its tabs. Each tab is a module with `show`, called whenever it is opened.
import * as classes from "./classes.js";
import * as models from "./models.js";
import * as search from "./search.js";
import * as attempt from "./try.js";

const TABS = { try: attempt, classes, search, models };
const tabs = [...document.querySelectorAll("[role=tab]")];

function open(tab) {
  for (const other of tabs) {
    const selected = other === tab, panel = document.getElementById(other.getAttribute("aria-controls"));
    other.setAttribute("aria-selected", selected);
    other.tabIndex = selected ? 0 : -1;
    panel.hidden = !selected;
  }
  TABS[tab.getAttribute("aria-controls")].show();
}

for (const [place, tab] of tabs.entries()) {
  tab.addEventListener("click", () => open(tab));
  tab.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!step) return;
    const next = tabs[(place + step + tabs.length) % tabs.length];
    next.focus();
    open(next);
  });
}
document.getElementById("key").addEventListener("change", () =>
  open(tabs.find((tab) => tab.getAttribute("aria-selected") === "true")));
open(tabs[0]);
