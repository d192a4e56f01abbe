// Runs a batch from this page. Each line is in IndexedDB with its answer, so a reload, or a crash, goes on where it was.
import { askJson, chatBody } from "./api.js";
import { all, get, transaction } from "./database.js";
import { sleep } from "./dom.js";
import { bodyOf, KINDS } from "./kinds.js";
import { withName } from "./names.js";
import { typed } from "./pictures.js";
import { partOf } from "./video_strip.js";

const AT_A_TIME = 50;
const LONGEST_WAIT = 30;
const rangeOf = (id) => IDBKeyRange.bound([id, 0], [id, Infinity]);

export const batches = async () => (await all("batches")).sort((a, b) => b.created - a.created);
export const linesOfBatch = (id) => all("lines", rangeOf(id));

// A batch is {id, name, created, kind: "analyze" | "ask", form, settings, total, state: "running" | "paused" | "done"}.
export async function create(batch, lines) {
  await transaction(["batches"], "readwrite", (stores) => stores.batches.put({ ...batch, state: "paused", total: lines.length }));
  for (let at = 0; at < lines.length; at += AT_A_TIME) {
    await transaction(["lines"], "readwrite", (stores) => {
      lines.slice(at, at + AT_A_TIME).forEach((line, index) => stores.lines.put({ ...line, batch: batch.id, number: at + index, state: "waiting" }));
    });
  }
  // Only now is it whole: one that was cut off here does not run by itself.
  await setState(batch.id, "running");
}

export async function setState(id, state) {
  const batch = await get("batches", id);
  if (batch) await transaction(["batches"], "readwrite", (stores) => stores.batches.put({ ...batch, state }));
}

export const forget = (id) => transaction(["batches", "lines"], "readwrite", (stores) => {
  stores.batches.delete(id);
  stores.lines.delete(rangeOf(id));
});

export async function againForFailed(id) {
  const failed = (await linesOfBatch(id)).filter(({ state }) => state === "failed");
  await transaction(["lines"], "readwrite", ({ lines }) => failed.forEach((line) => lines.put({ ...line, state: "waiting", error: undefined })));
}

const dataUrl = (blob) => new Promise((resolve, reject) => {
  const reader = new FileReader();
  reader.onload = () => resolve(typed(blob, reader.result));
  reader.onerror = () => reject(new Error(`the file cannot be read: ${reader.error.message}`));
  // A file whose type the system does not know is told by its first bytes on the server.
  reader.readAsDataURL(blob.type ? blob : new Blob([blob], { type: "application/octet-stream" }));
});

async function request(batch, line) {
  const whole = typeof line.image === "string" ? line.image : await dataUrl(line.image);
  const url = line.pages ? `${whole}#page=${line.pages}` : whole;
  const { form, settings } = batch;
  if (batch.kind === "analyze") return [KINDS.analyze.path, bodyOf("analyze", settings, form, url)];
  const content = [partOf(url), { type: "text", text: line.question ?? form.question }];
  const system = settings.system ? [{ role: "system", content: settings.system }] : [];
  return ["v1/chat/completions", chatBody(settings, [...system, { role: "user", content }])];
}

// Answers one line. A server that is away, full or starting is waited for; `told(text)` says so.
async function answer(batch, line, told, signal) {
  const [path, body] = await request(batch, line);
  for (let tries = 0; ; tries += 1) {
    try {
      const { found, ms, cache } = await askJson(path, body, batch.settings, signal);
      told("");
      return { ...line, state: "done", found: batch.kind === "ask" ? { answer: found.choices[0].message.content, usage: found.usage } : found, ms, cache };
    } catch (error) {
      // Without a key that is accepted every line would fail: the batch waits for its person instead.
      if (error.name === "AbortError" || error.status === 401) throw error;
      if (!error.lost && ![429, 503].includes(error.status)) {
        return { ...line, state: "failed", error: withName(error.message, line.name) };
      }
      const wait = Math.min(LONGEST_WAIT, error.wait || 2 ** Math.min(tries, 5));
      told(`${error.lost ? "The server cannot be reached" : error.message}; asked again in ${wait} s.`);
      await sleep(wait * 1000, signal);
    }
  }
}

// Asks what is left, `atOnce` lines at a time; changed(line) is called after each that was kept.
export async function run(batch, { atOnce, changed, told, signal }) {
  const waiting = (await linesOfBatch(batch.id)).filter(({ state }) => state === "waiting");
  let refused = null;
  const worker = async () => {
    while (waiting.length && !signal.aborted && !refused) {
      const line = waiting.shift();
      let answered;
      try {
        answered = await answer(batch, line, told, signal);
      } catch (error) {
        if (error.name === "AbortError") return;
        if (error.status === 401) {
          refused = error;
          return;
        }
        answered = { ...line, state: "failed", error: error.message };
      }
      await transaction(["lines"], "readwrite", ({ lines }) => lines.put(answered));
      changed(answered);
    }
  };
  await Promise.all(Array.from({ length: atOnce }, worker));
  if (!signal.aborted) await setState(batch.id, refused ? "paused" : "done");
  return refused?.message ?? "";
}

// One tab of several runs a batch: the others leave it alone. Without locks (pages that are not secure) each tab runs it.
export async function alone(id, work) {
  if (!navigator.locks) return work();
  return navigator.locks.request(`qvl-batch-${id}`, { ifAvailable: true }, (lock) => (lock ? work() : "elsewhere"));
}
