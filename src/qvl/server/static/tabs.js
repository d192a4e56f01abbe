// Tabs by click, arrows, Home and End.
import { $ } from "./dom.js";

const tabs = [...document.querySelectorAll("[role=tab]")];

export const chosenTab = () => tabs.find((tab) => tab.ariaSelected === "true").id.slice("tab-".length);

export function showTab(name) {
  for (const other of tabs) {
    const is = other.id === `tab-${name}`;
    other.ariaSelected = String(is);
    other.tabIndex = is ? 0 : -1;
    $(other.getAttribute("aria-controls")).hidden = !is;
  }
}

export function startTabs(chosen) {
  for (const tab of tabs) {
    tab.onclick = () => chosen(tab.id.slice("tab-".length));
    tab.onkeydown = (event) => {
      const at = tabs.indexOf(tab);
      const to = { ArrowRight: at + 1, ArrowLeft: at - 1, Home: 0, End: -1 }[event.key];
      if (to === undefined) return;
      event.preventDefault();
      const other = tabs.at(to % tabs.length);
      chosen(other.id.slice("tab-".length));
      other.focus();
    };
  }
}
