// Sorts and filters the rows of a report, and shows them as a list or as a contact sheet.
const rows = document.getElementById("rows");
const all = [...rows.children];
const field = (id) => document.getElementById(id);
const order = {
  order: (row) => Number(row.dataset.order),
  name: (row) => row.dataset.name,
  sure: (row) => Number(row.dataset.sure || 2),
  slow: (row) => -Number(row.dataset.seconds || 0),
};
function show() {
  const words = field("find").value.toLowerCase().split(/\s+/).filter(Boolean);
  const state = field("state").value;
  const key = order[field("sort").value];
  let shown = 0;
  for (const row of all) {
    const text = row.textContent.toLowerCase();
    row.hidden = (state && !row.dataset.state.split(" ").includes(state)) || !words.every((word) => text.includes(word));
    shown += !row.hidden;
  }
  const compare = (a, b) => (a < b ? -1 : a > b ? 1 : 0);
  rows.append(...all.toSorted((a, b) => compare(key(a), key(b)) || compare(order.order(a), order.order(b))));
  field("shown").textContent = `${shown} of ${all.length} shown`;
}
for (const id of ["find", "state", "sort"]) field(id).addEventListener("input", show);
field("sheet").addEventListener("click", () => {
  const on = rows.classList.toggle("sheet");
  field("sheet").setAttribute("aria-pressed", String(on));
});
field("controls").hidden = all.length < 2;
show();
