// The page at `/`: its tabs. Each tab is a module with `show`, called whenever it is opened.
import * as classes from "./classes.js";
import * as models from "./models.js";
import * as search from "./search.js";
import { tablist } from "./shared.js";
import * as attempt from "./try.js";

const TABS = { try: attempt, classes, search, models };
const pages = document.getElementById("pages");

function open(tab) {
  const name = tab.getAttribute("aria-controls");
  for (const other of Object.keys(TABS)) document.getElementById(other).hidden = other !== name;
  TABS[name].show();
}

// A file that is dropped beside its target would be opened in place of the page.
for (const type of ["dragover", "drop"])
  document.addEventListener(type, (event) => event.dataTransfer.types.includes("Files") && event.preventDefault());

const select = tablist(pages, open);
document.getElementById("key").addEventListener("change", () => open(pages.querySelector("[aria-selected=true]")));
select(pages.firstElementChild);
