// A table of results: sorts by a click on a head, filters by typed words, leaves as CSV or JSONL.
import { button, download, element } from "./dom.js";
import { toCsv } from "./csv.js";

const byValue = (a, b) => {
  const none = (value) => value === null || value === undefined || value === "";
  if (none(a) || none(b)) return none(a) - none(b); // what is missing stands last
  if (typeof a === "number" && typeof b === "number") return a - b;
  return String(a).localeCompare(String(b), undefined, { numeric: true });
};

// `columns()` are {name, value(row), cell(row)}: what is sorted and exported, and the elements that are shown.
// `record(row)` is a line of JSONL; opened(row) is called when a row is chosen.
export class ResultsTable {
  constructor({ columns, record, opened, name }) {
    Object.assign(this, { columns, record, opened, name });
    this.rows = [];
    this.chosen = null;
    this.sort = null;
    this.filter = element("input", { type: "search", placeholder: "Filter", ariaLabel: "Filter the rows", oninput: () => this.show() });
    this.count = element("span", { className: "how", attributes: { role: "status" } });
    this.head = element("tr");
    this.body = element("tbody");
    this.element = element("div", { className: "results" },
      element("div", { className: "row" }, this.filter, this.count,
        button("CSV", () => this.csv()), button("JSONL", () => this.jsonl())),
      element("div", { className: "scroll", tabIndex: 0, role: "region", ariaLabel: "Table of results" },
        element("table", {}, element("thead", {}, this.head), this.body)));
  }

  set(rows) {
    this.rows = rows;
    if (!rows.includes(this.chosen)) this.chosen = null;
    this.show();
  }

  shown() {
    const words = this.filter.value.toLowerCase().split(/\s+/).filter(Boolean);
    const columns = this.columns();
    const text = (row) => columns.map((column) => column.value(row) ?? "").join(" ").toLowerCase();
    const found = this.rows.filter((row) => words.every((word) => text(row).includes(word)));
    const column = this.sort && columns.find(({ name }) => name === this.sort.name);
    if (!column) return found;
    return found.sort((a, b) => {
      const [left, right] = [column.value(a), column.value(b)];
      const order = byValue(left, right);
      const missing = [left, right].some((value) => value === null || value === undefined || value === "");
      return this.sort.down && !missing ? -order : order;
    });
  }

  show() {
    const columns = this.columns();
    this.head.replaceChildren(...columns.map((column) => {
      const sorted = this.sort?.name === column.name;
      const mark = sorted ? (this.sort.down ? " ▼" : " ▲") : "";
      const press = element("button", { type: "button", className: "sort", textContent: column.name + mark });
      press.onclick = () => {
        this.sort = { name: column.name, down: sorted && !this.sort.down };
        this.show();
        this.head.querySelectorAll("button")[columns.indexOf(column)]?.focus();
      };
      const order = sorted ? (this.sort.down ? "descending" : "ascending") : "none";
      return element("th", { scope: "col", attributes: { "aria-sort": order } }, press);
    }));
    const rows = this.shown();
    this.body.replaceChildren(...rows.map((row) => element("tr", {
      className: row === this.chosen ? "chosen" : "", onclick: () => this.choose(row),
    }, ...columns.map((column) => element("td", {}, ...[column.cell(row)].flat())))));
    this.count.textContent = rows.length === this.rows.length ? `${rows.length} rows` : `${rows.length} of ${this.rows.length} rows`;
  }

  choose(row) {
    this.chosen = row;
    this.show();
    this.opened(row);
  }

  csv() {
    const columns = this.columns();
    const rows = this.shown().map((row) => columns.map((column) => column.value(row)));
    download(`${this.name}.csv`, "text/csv", toCsv(columns.map(({ name }) => name), rows));
  }

  jsonl() {
    download(`${this.name}.jsonl`, "application/jsonl", this.shown().map((row) => `${JSON.stringify(this.record(row))}\n`).join(""));
  }
}
