// The tab Batch: many pictures with one question or one schema; progress, results, resumed after a reload.
import { againForFailed, alone, batches, create, forget, linesOfBatch, run, setState } from "./batch_run.js";
import { filesOf, linesOf } from "./batch_lines.js";
import { toCsv } from "./csv.js";
import { $, button, download, element, fail } from "./dom.js";
import { leaves, shownValue } from "./fields_view.js";
import { KINDS } from "./kinds.js";
import { settings, wrongSetting } from "./settings.js";

let chosen = null; // {lines, notes, name}
const running = new Map(); // AbortControllers by batch
const views = new Map();

function take(files) {
  linesOf(files).then((found) => {
    const folder = (files[0].inside || files[0].webkitRelativePath || "").split("/")[0];
    chosen = { ...found, name: files.find(({ name }) => /\.(csv|tsv)$/i.test(name))?.name ?? (folder || "Files") };
    fail("");
    showChosen();
  }, (error) => fail(error.message));
}

export const dropOnBatch = async (transfer) => take(await filesOf(transfer));

function showChosen() {
  const own = chosen?.lines.filter(({ question }) => question).length;
  $("batch-chosen").textContent = chosen ? [
    `${chosen.name}: ${chosen.lines.length} to ask about.`, ...chosen.notes,
    own ? `${own} have a question of their own.` : "",
  ].join(" ") : "";
  $("batch-start").disabled = !chosen;
}

async function start() {
  const kind = $("batch-kind").value;
  let form;
  try {
    const wrong = wrongSetting();
    if (wrong) throw new Error(wrong);
    form = kind === "analyze" ? KINDS.analyze.form() : { question: $("batch-question").value.trim() || $("batch-question").placeholder };
  } catch (error) {
    fail(error.message);
    return;
  }
  const batch = { id: crypto.randomUUID?.() ?? `${Date.now()}-${Math.random()}`, name: chosen.name, created: Date.now(), kind, form, settings: settings() };
  const { lines } = chosen;
  $("batch-start").disabled = true;
  try {
    await create(batch, lines);
    chosen = null;
  } catch (error) {
    fail(`This browser cannot keep the batch: ${error.message}`);
    await forget(batch.id).catch(() => {});
  }
  showChosen();
  await showBatches();
}

const counts = (lines) => ({
  done: lines.filter(({ state }) => state === "done").length, failed: lines.filter(({ state }) => state === "failed").length, total: lines.length,
});

async function view(batch) {
  const { total, ...count } = counts(await linesOfBatch(batch.id));
  const bar = element("progress", { max: total, ariaLabel: `progress of ${batch.name}` });
  const text = element("span", { attributes: { role: "status" } });
  const waits = element("p", { className: "how" });
  const failures = element("ul", { className: "failures" });
  const actions = element("div", { className: "actions" });
  const made = {
    batch, count,
    element: element("article", { className: "batch" }, element("h3", { textContent: batch.name }),
      element("p", { className: "how", textContent: `${batch.kind === "ask" ? batch.form.question : "analyze"} · ${new Date(batch.created).toLocaleString()}` }),
      element("div", { className: "row" }, bar, text), waits, failures, actions),
    told: (said) => { waits.textContent = said; },
    show() {
      bar.value = count.done + count.failed;
      text.textContent = `${count.done} of ${total} answered${count.failed ? `, ${count.failed} failed` : ""}`;
      const on = running.has(batch.id);
      const left = total - count.done - count.failed;
      actions.replaceChildren(...[
        on ? button("Pause", () => pause(batch)) : null,
        !on && left ? button("Go on", () => goOn(made)) : null,
        !on && count.failed ? button("Ask the failed ones again", async () => { await againForFailed(batch.id); await showBatches(); goOn(views.get(batch.id)); }) : null,
        count.done + count.failed ? button("CSV", () => save(batch, "csv")) : null,
        count.done + count.failed ? button("JSONL", () => save(batch, "jsonl")) : null,
        on ? null : button("Forget", async () => { await forget(batch.id); showBatches(); }),
      ].filter(Boolean));
    },
    failed(line) {
      if (failures.childElementCount < 5) failures.append(element("li", { className: "failed", textContent: line.error.startsWith(line.name) ? line.error : `${line.name}: ${line.error}` }));
    },
  };
  if (count.failed) (await linesOfBatch(batch.id)).filter(({ state }) => state === "failed").forEach(made.failed);
  made.show();
  return made;
}

async function pause(batch) {
  running.get(batch.id)?.abort();
  await setState(batch.id, "paused");
}

async function goOn(made) {
  const { batch, count } = made;
  if (running.has(batch.id)) return;
  const controller = new AbortController();
  running.set(batch.id, controller);
  made.show();
  const said = await alone(batch.id, async () => {
    await setState(batch.id, "running");
    return run(batch, {
      atOnce: Math.max(1, Math.min(32, Number($("batch-at-once").value) || 4)), signal: controller.signal, told: made.told,
      changed: (line) => {
        count[line.state] += 1;
        if (line.state === "failed") made.failed(line);
        made.show();
      },
    });
  });
  running.delete(batch.id);
  made.told(said === "elsewhere" ? "It runs in another tab of this browser." : said);
  made.show();
}

const under = (head, told = {}) => Object.fromEntries(Object.entries(told).map(([path, value]) => [`${head}.${path}`, value]));

async function save(batch, form) {
  const lines = await linesOfBatch(batch.id);
  const ended = lines.filter(({ state }) => state !== "waiting");
  const base = batch.name.replace(/\.\w+$/, "");
  if (form === "jsonl") {
    download(`${base}.jsonl`, "application/jsonl", ended.map(({ name, question, own, found, error }) =>
      `${JSON.stringify({ picture: name, ...(question && { question }), ...(own && { row: own }), ...(error ? { error } : found) })}\n`).join(""));
    return;
  }
  const flat = ended.map(({ name, own, found, error }) => {
    const told = batch.kind === "ask" ? { answer: found?.answer } : found && {
      ...Object.fromEntries(leaves(found.analysis).map(([path, value]) => [path, value && typeof value === "object" ? shownValue(value) : value])),
      confidence: found.confidence, ...under("pages", found.pages), ...under("abstained", found.abstained),
    };
    return { ...(own ?? { picture: name }), ...told, error };
  });
  const head = [...new Set(flat.flatMap(Object.keys))].filter((name) => name !== "error").concat("error");
  download(`${base}.csv`, "text/csv", toCsv(head, flat.map((row) => head.map((name) => row[name]))));
}

export async function showBatches() {
  let known = [];
  try {
    known = await batches();
  } catch (error) {
    $("batch-note").textContent = `This browser keeps no batches: ${error.message}`;
  }
  for (const batch of known) if (!running.has(batch.id)) views.set(batch.id, await view(batch));
  $("batches").replaceChildren(...known.map(({ id }) => views.get(id).element));
  $("batches-card").hidden = $("panel-batch").hidden || !known.length;
  // What was running when the page was left goes on.
  for (const batch of known) if (batch.state === "running") goOn(views.get(batch.id));
}

export function startBatch() {
  for (const name of ["batch-folder", "batch-files"]) {
    $(`choose-${name}`).onclick = () => $(name).click();
    $(name).onchange = () => { if ($(name).files.length) take([...$(name).files]); $(name).value = ""; };
  }
  $("batch-kind").onchange = () => { $("batch-asks").hidden = $("batch-kind").value !== "ask"; };
  $("panel-batch").addEventListener("submit", (event) => {
    event.preventDefault();
    if (chosen) start();
  });
  showChosen();
  showBatches();
}
