// The history: what was asked and answered, with its pictures, in this browser alone.
import { all, get, transaction } from "./database.js";
import { $, button, element, fail } from "./dom.js";
import { posterOf } from "./video_strip.js";

const MOST = 200;
const KINDS = { chat: "Chat", analyze: "Analyze", locate: "Locate", decide: "Decide", compare: "Compare" };
const openers = {};

// `open(body)` shows an entry of a kind again.
export function onOpen(kind, open) {
  openers[kind] = open;
}

async function smaller(picture) {
  if (!picture?.url) return null;
  const image = new Image();
  image.src = posterOf(picture);
  try {
    await image.decode();
  } catch {
    return null;
  }
  const scale = Math.min(1, 96 / Math.max(image.naturalWidth, image.naturalHeight));
  const canvas = element("canvas", { width: Math.max(1, image.naturalWidth * scale), height: Math.max(1, image.naturalHeight * scale) });
  canvas.getContext("2d").drawImage(image, 0, 0, canvas.width, canvas.height);
  return canvas.toDataURL("image/webp", 0.8);
}

// Keeps an entry {id, kind, title, thumbnail: a picture, …}; one of the same id is replaced.
export async function keep({ title, thumbnail, ...body }) {
  const entry = { id: body.id, kind: body.kind, title: title || "(no text)", updated: Date.now(), thumbnail: await smaller(thumbnail) };
  // Promises of pictures that are being read cannot be stored.
  const plain = JSON.parse(JSON.stringify(body, (name, value) => (name === "reading" ? undefined : value)));
  try {
    await transaction(["entries", "bodies"], "readwrite", ({ entries, bodies }) => {
      entries.put(entry);
      bodies.put(plain);
    });
    const old = (await all("entries")).sort((a, b) => b.updated - a.updated).slice(MOST);
    if (old.length) await forget(old.map(({ id }) => id));
  } catch (error) {
    $("history-note").textContent = `This browser does not keep the history: ${error.message}`;
  }
}

const forget = (ids) => transaction(["entries", "bodies"], "readwrite", ({ entries, bodies }) => {
  for (const id of ids) {
    entries.delete(id);
    bodies.delete(id);
  }
});

async function reopen(entry) {
  try {
    const body = await get("bodies", entry.id);
    if (!body) throw new Error("it is no longer there");
    await openers[entry.kind](body);
  } catch (error) {
    fail(`This entry cannot be opened: ${error.message}`);
  }
}

function line(entry) {
  const when = new Date(entry.updated).toLocaleString([], { dateStyle: "short", timeStyle: "short" });
  const open = element("button", { type: "button", className: "entry", onclick: () => reopen(entry) },
    entry.thumbnail ? element("img", { src: entry.thumbnail, alt: "" }) : null,
    element("span", { className: "said", textContent: entry.title }),
    element("span", { className: "how", textContent: `${KINDS[entry.kind]} · ${when}` }));
  const away = element("button", { type: "button", className: "away", textContent: "×", ariaLabel: `Forget: ${entry.title}` });
  away.onclick = async () => { await forget([entry.id]); changedHistory(); };
  return element("li", {}, open, away);
}

export async function changedHistory() {
  let entries = [];
  try {
    entries = (await all("entries")).sort((a, b) => b.updated - a.updated);
  } catch (error) {
    $("history-note").textContent = `This browser keeps no history: ${error.message}`;
  }
  $("history").replaceChildren(...entries.map(line));
  $("history-empty").hidden = entries.length > 0;
  $("clear-history").hidden = entries.length === 0;
}

export function startHistory() {
  const clear = $("clear-history");
  clear.onclick = () => {
    const sure = button("Forget all of it", async () => {
      await transaction(["entries", "bodies"], "readwrite", ({ entries, bodies }) => { entries.clear(); bodies.clear(); });
      $("sure").replaceChildren();
      changedHistory();
    });
    $("sure").replaceChildren("It cannot be brought back. ", sure, button("Keep it", () => $("sure").replaceChildren()));
    sure.focus();
  };
  changedHistory();
}
