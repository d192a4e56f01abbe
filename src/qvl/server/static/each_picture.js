// The tabs Analyze, Locate and Decide: one request for each picture, a table of several results, one in full.
import { askJson } from "./api.js";
import { openCode } from "./code_dialog.js";
import { isDocumentUrl, pageOf } from "./document_sheet.js";
import { $, button, element, fail } from "./dom.js";
import { changedHistory, keep, onOpen } from "./history.js";
import { bodyOf, columnsOf, detail, KINDS } from "./kinds.js";
import { withName } from "./names.js";
import { current, replaceAll, whenRead } from "./pictures.js";
import { startQuestions } from "./questions_editor.js";
import { ResultsTable } from "./results_table.js";
import { startSchemaEditor } from "./schema_editor.js";
import { settings, wrongSetting } from "./settings.js";

const AT_ONCE = 4;
// What is shown of each tab: {id, kind, form, settings, rows}.
const runs = {};
let underWay = null; // {controller, kind}

export function showRun(kind) {
  const run = runs[kind];
  $("result").hidden = !run;
  $("result").replaceChildren(...(run ? [view(run)] : []));
  showButtons();
}

function showButtons() {
  for (const kind of Object.keys(KINDS)) $(kind).disabled = underWay !== null;
  for (const stop of document.querySelectorAll(".stop-run")) stop.hidden = underWay === null;
}

function view(run) {
  const { kind, rows, form } = run;
  const place = element("div", { className: "analysis", attributes: { "aria-live": "polite" } });
  const open = (row) => {
    run.chosen = row;
    place.replaceChildren(element("h3", { textContent: row.picture.name }), ...detail(kind, row, form),
      element("div", { className: "actions" }, button("Copy as …", () =>
        openCode(KINDS[kind].path, bodyOf(kind, run.settings, form, row.picture.url), run.settings))));
  };
  open(run.chosen ?? rows[0]);
  run.redraw = (row) => {
    table?.set(rows);
    if (row === run.chosen) open(row);
  };
  const table = rows.length < 2 ? null : new ResultsTable({
    columns: () => columnsOf(kind, rows, form), opened: open, name: kind,
    record: ({ picture, found, failed, cache, ms }) => ({ picture: picture.name, ...(found ? { ...found, cache, ms: Math.round(ms) } : { error: failed ?? null }) }),
  });
  table?.set(rows);
  return element("div", { id: "answer" }, element("h2", { textContent: KINDS[kind].title(form) }), table?.element, place);
}

async function one(run, row, signal) {
  try {
    await whenRead([row.picture], signal);
    const { name, url } = row.picture;
    const body = bodyOf(run.kind, run.settings, run.form, url);
    // A browser does not draw the page of a document: the server's own rendering is what places lie on.
    const drawn = isDocumentUrl(url) && KINDS[run.kind].draws?.(run.form);
    Object.assign(row, await askJson(KINDS[run.kind].path, drawn ? { ...body, overlay: "svg" } : body, run.settings, signal));
    if (drawn) row.drawn = pageOf(name, row.found);
    delete row.failed;
  } catch (error) {
    row.failed = error.name === "AbortError" ? "stopped" : withName(error.message, row.picture.name);
  }
  run.redraw(row);
}

async function ask(kind) {
  if (underWay) return;
  let form;
  try {
    form = KINDS[kind].form();
    const wrong = wrongSetting();
    if (wrong) throw new Error(wrong);
    if (!current().length && !KINDS[kind].without?.(form)) throw new Error("Add a picture first.");
  } catch (error) {
    fail(error.message);
    return;
  }
  fail("");
  const pictures = current().length ? [...current()] : [{ name: "the text", url: null }];
  const rows = pictures.map((picture) => ({ picture }));
  const run = { id: crypto.randomUUID?.() ?? `${Date.now()}-${Math.random()}`, kind, form, settings: settings(), rows };
  runs[kind] = run;
  const controller = new AbortController();
  underWay = { controller, kind };
  showRun(kind);
  const waiting = [...rows];
  const worker = async () => {
    while (waiting.length && !controller.signal.aborted) await one(run, waiting.shift(), controller.signal);
  };
  await Promise.all(Array.from({ length: AT_ONCE }, worker));
  for (const row of rows) if (!row.found && !row.failed) row.failed = "stopped";
  underWay = null;
  run.redraw(run.chosen);
  showButtons();
  // A single one that could not be read or was refused is told at the top, as in a conversation.
  if (rows.length === 1 && rows[0].failed && rows[0].failed !== "stopped") fail(rows[0].failed);
  if (!rows.some(({ found }) => found)) return;
  await keep({
    id: run.id, kind, form, settings: run.settings, rows: rows.map(({ picture, drawn, found, failed, cache, ms }) => ({ picture, drawn, found, failed, cache, ms })),
    title: KINDS[kind].title(form), thumbnail: rows[0].picture,
  });
  changedHistory();
}

// Shows a run that was kept, its pictures and its form as they were.
function reopen(run, chooseTab) {
  runs[run.kind] = run;
  KINDS[run.kind].fill(run.form);
  chooseTab(run.kind);
  replaceAll(run.rows.map(({ picture }) => picture).filter(({ url }) => url));
}

export function startEachPicture(chooseTab) {
  startSchemaEditor();
  startQuestions();
  for (const kind of Object.keys(KINDS)) {
    $(`panel-${kind}`).addEventListener("submit", (event) => {
      event.preventDefault();
      ask(kind);
    });
    onOpen(kind, (run) => reopen(run, chooseTab));
  }
  for (const stop of document.querySelectorAll(".stop-run")) stop.onclick = () => underWay?.controller.abort();
}
