import { $, askForKey, call, errorOf } from "./session.js";

// {name, url, reading}: in the order in which they will be sent; url is a data URL, null until the file has been read.
const pictures = [];
let under_way = null;

function element(tag, fields = {}, ...children) {
  const made = Object.assign(document.createElement(tag), fields);
  made.append(...children);
  return made;
}

// Pictures

function readFile(file) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(reader.error);
    reader.readAsDataURL(file);
  });
}

function remove(picture) {
  const index = pictures.indexOf(picture);
  if (index >= 0) pictures.splice(index, 1);
  showPictures();
}

function add(files) {
  const images = [...files].filter((file) => file.type.startsWith("image/"));
  const others = [...files].filter((file) => !images.includes(file)).map((file) => file.name || "pasted");
  for (const file of images) {
    const picture = { name: file.name || "pasted", url: null };
    // Never rejects: who waits for several reads wants them all, whichever fails.
    picture.reading = readFile(file).then((url) => {
      picture.url = url;
      showPictures();
    }, (error) => {
      picture.failed = error;
      remove(picture);
      fail(`${picture.name} cannot be read: ${error.message}`);
    });
    pictures.push(picture);
  }
  showPictures();
  if (others.length) fail(`Not a picture: ${others.join(", ")}`);
}

function showPictures() {
  $("pictures").replaceChildren(...pictures.map((picture) => {
    const button = element("button", { type: "button", textContent: "×", ariaLabel: `Remove ${picture.name}` });
    button.onclick = (event) => {
      event.stopPropagation();
      remove(picture);
      $("drop").focus();
    };
    const shown = picture.url
      ? element("img", { src: picture.url, alt: picture.name })
      : element("span", { className: "reading", textContent: `reading ${picture.name} …` });
    return element("li", {}, shown, button);
  }));
}

// The pictures as they stand when a request is sent, once all of them have been read.
async function picturesToSend(signal) {
  const sent = [...pictures];
  await Promise.all(sent.map((picture) => picture.reading));
  signal.throwIfAborted();
  const failed = sent.find((picture) => picture.failed);
  if (failed) throw new Error(`${failed.name} cannot be read: ${failed.failed.message}`);
  return sent;
}

const drop = $("drop");
// Not for the input itself: its click comes up here, and would open a second chooser.
drop.addEventListener("click", (event) => { if (!event.target.closest("button, input")) $("files").click(); });
drop.addEventListener("keydown", (event) => {
  if (event.target === drop && (event.key === "Enter" || event.key === " ")) {
    event.preventDefault();
    $("files").click();
  }
});
$("files").addEventListener("change", () => { add($("files").files); $("files").value = ""; });
for (const kind of ["dragover", "dragenter"]) {
  document.addEventListener(kind, (event) => { event.preventDefault(); drop.classList.add("over"); });
}
document.addEventListener("dragleave", (event) => { if (!event.relatedTarget) drop.classList.remove("over"); });
document.addEventListener("drop", (event) => {
  event.preventDefault();
  drop.classList.remove("over");
  add(event.dataTransfer.files);
});
document.addEventListener("paste", (event) => { if (event.clipboardData.files.length) add(event.clipboardData.files); });

// Tabs, by arrows too

const tabs = [$("tab-ask"), $("tab-analyze"), $("tab-locate")];
function choose(tab) {
  for (const other of tabs) {
    const chosen = other === tab;
    other.ariaSelected = String(chosen);
    other.tabIndex = chosen ? 0 : -1;
    $(other.getAttribute("aria-controls")).hidden = !chosen;
  }
}
for (const tab of tabs) {
  tab.onclick = () => choose(tab);
  tab.onkeydown = (event) => {
    if (event.key !== "ArrowRight" && event.key !== "ArrowLeft") return;
    const step = event.key === "ArrowRight" ? 1 : tabs.length - 1;
    const other = tabs[(tabs.indexOf(tab) + step) % tabs.length];
    choose(other);
    other.focus();
  };
}

// Answers

function begin(button) {
  under_way?.abort();
  const controller = new AbortController();
  under_way = controller;
  $("error").hidden = true;
  $("answer").replaceChildren();
  $("answer").classList.add("busy");
  $("facts").replaceChildren();
  button.disabled = true;
  return { controller, signal: controller.signal, sent: [] };
}

function end(button, controller) {
  button.disabled = false;
  // A later request may be under way by now, in the same place.
  if (under_way === controller) $("answer").classList.remove("busy");
}

function fail(message) {
  $("error").textContent = message;
  $("error").hidden = false;
}

// The server names a picture by its place in the request; people know it by its name.
function named(message, sent) {
  return message.replace(/^(?:messages\[0\]\.content\[(\d+)\](?:\.image_url)?|image)(?=:)/,
    (place, index) => sent[index ?? 0]?.name ?? place);
}

function facts(found, list = $("facts")) {
  list.replaceChildren(...Object.entries(found).filter(([, value]) => value !== undefined && value !== null)
    .map(([name, value]) => element("div", {}, element("dt", { textContent: name }), element("dd", { textContent: value }))));
}

const seconds = (ms) => (ms < 1000 ? `${Math.round(ms)} ms` : `${(ms / 1000).toFixed(2)} s`);

function tokens(usage) {
  if (!usage) return undefined;
  const images = usage.prompt_tokens_details?.image_tokens;
  return `${usage.prompt_tokens} in${images ? ` (${images} picture)` : ""}, ${usage.completion_tokens} out`;
}

function remember(said, ms, cache, image) {
  const strip = $("strip");
  const parts = [element("span", { className: "said", textContent: said }),
    element("span", { className: "how", textContent: `${seconds(ms)} · ${cache}` })];
  if (image) parts.unshift(element("img", { src: image.url, alt: image.name }));
  strip.prepend(element("li", {}, ...parts));
  while (strip.children.length > 12) strip.lastChild.remove();
}

function post(path, body, fresh, signal) {
  const headers = { "Content-Type": "application/json" };
  if (fresh) headers["Cache-Control"] = "no-cache";
  return call(path, { method: "POST", headers, body: JSON.stringify(body), signal });
}

async function* events(answer) {
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    held += value;
    const parts = held.split("\n\n");
    held = parts.pop();
    for (const part of parts) {
      if (!part.startsWith("data: ")) continue; // a comment that keeps the connection open
      const data = part.slice(6);
      if (data === "[DONE]") return;
      yield JSON.parse(data);
    }
  }
}

async function guarded(button, work) {
  const run = begin(button);
  try {
    run.sent = await picturesToSend(run.signal);
    await work(run);
  } catch (error) {
    if (error.name !== "AbortError") fail(named(error.message, run.sent));
  } finally {
    end(button, run.controller);
  }
}

$("panel-ask").addEventListener("submit", (event) => {
  event.preventDefault();
  const text = $("question").value.trim() || $("question").placeholder;
  guarded($("send"), async ({ sent, signal }) => {
    const started = performance.now();
    const content = [...sent.map(({ url }) => ({ type: "image_url", image_url: { url } })), { type: "text", text }];
    const answer = await post("v1/chat/completions", {
      model: $("model").value || undefined,
      messages: [{ role: "user", content }],
      max_tokens: Number($("tokens").value) || 256,
      stream: true,
      stream_options: { include_usage: true },
    }, $("fresh").checked, signal);
    if (!answer.ok) throw new Error(await errorOf(answer));
    const cache = answer.headers.get("x-qvl-cache");
    let first, usage, reason;
    for await (const piece of events(answer)) {
      if (piece.error) throw new Error(piece.error.message);
      usage = piece.usage ?? usage;
      const choice = piece.choices[0];
      reason = choice?.finish_reason ?? reason;
      if (!choice?.delta.content) continue;
      first ??= performance.now() - started;
      $("answer").append(choice.delta.content);
    }
    const total = performance.now() - started;
    facts({ cache, "first token": first && seconds(first), total: seconds(total), tokens: tokens(usage), ended: reason });
    remember($("answer").textContent, total, cache, sent[0]);
  });
});

$("question").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) $("panel-ask").requestSubmit();
});

function leaves(value, path = "") {
  if (value === null || typeof value !== "object") return [[path, value]];
  return Object.entries(value).flatMap(([name, inner]) => leaves(inner, path ? `${path}.${name}` : name));
}

function field([name, value], sure) {
  const row = element("div", { className: "field" }, element("span", { className: "name", textContent: name }));
  if (value !== "") row.append(element("span", { textContent: value ?? "—" }));
  if (sure !== undefined && sure !== null) {
    row.append(element("span", { className: "sure" },
      element("meter", { min: 0, max: 1, low: 0.5, high: 0.8, optimum: 1, value: sure, ariaLabel: `confidence of ${name}` }),
      `${Math.round(sure * 100)} %`));
  }
  return row;
}

// The fields of one picture's analysis; `list` takes the facts about it.
async function analyze(picture, list, signal) {
  const started = performance.now();
  const answer = await post("v1/analyze", {
    model: $("model").value || undefined,
    image: picture.url,
    language: $("language").value,
    evidence: $("where").checked,
    overlay: $("where").checked ? "svg" : undefined,
  }, $("fresh-analysis").checked, signal);
  if (!answer.ok) throw new Error(named(await errorOf(answer), [picture]));
  const found = await answer.json();
  const total = performance.now() - started;
  const cache = answer.headers.get("x-qvl-cache");
  const rows = leaves(found.analysis).map((leaf) => field(leaf, found.field_confidence[leaf[0]]));
  facts({ cache, total: seconds(total), tokens: tokens(found.usage) }, list);
  remember(Object.values(found.analysis).filter((value) => typeof value === "string").join(", "), total, cache, picture);
  return [...drawn(found, picture), ...rows, field(["all together", ""], found.confidence)];
}

// The picture with what was located on it, if it came.
function drawn(found, picture) {
  return found.overlay ? [element("img", { className: "overlay", src: found.overlay, alt: `${picture.name}, with boxes` })] : [];
}

async function locate(picture, list, signal) {
  const started = performance.now();
  const targets = ($("targets").value.trim() || $("targets").placeholder).split("\n").filter((line) => line.trim());
  const answer = await post("v1/locate", {
    model: $("model").value || undefined,
    image: picture.url,
    targets,
    points: $("points").checked,
    overlay: "svg",
  }, $("fresh-places").checked, signal);
  if (!answer.ok) throw new Error(named(await errorOf(answer), [picture]));
  const found = await answer.json();
  const total = performance.now() - started;
  const cache = answer.headers.get("x-qvl-cache");
  const rows = found.located.map(({ label, box, point, confidence }) => {
    const place = box ? [box.x1, box.y1, box.x2, box.y2] : [point.x, point.y];
    return field([label, place.map(Math.round).join(", ")], confidence);
  });
  if (!rows.length) rows.push(element("p", { textContent: "nothing located" }));
  rows.push(...found.notes.map((note) => element("p", { className: "how", textContent: note })));
  facts({ cache, total: seconds(total), tokens: tokens(found.usage) }, list);
  remember(`${targets.join(", ")}: ${found.located.length}`, total, cache, picture);
  return [...drawn(found, picture), ...rows];
}

// One request for each picture; `work` returns what to show of it.
function eachPicture(button, work) {
  if (!pictures.length) return fail("Add a picture first.");
  return guarded(button, async ({ sent, signal }) => {
    if (sent.length === 1) {
      $("answer").append(...(await work(sent[0], $("facts"), signal)));
      return;
    }
    for (const picture of sent) {
      const list = element("dl", { className: "facts" });
      const section = element("section", { className: "analysis" }, element("h3", { textContent: picture.name }));
      try {
        section.append(...(await work(picture, list, signal)), list);
      } catch (error) {
        if (error.name === "AbortError") throw error;
        section.append(element("p", { className: "failed", textContent: error.message }));
      }
      $("answer").append(section);
    }
  });
}

for (const [what, work] of [["analyze", analyze], ["locate", locate]]) {
  $(`panel-${what}`).addEventListener("submit", (event) => {
    event.preventDefault();
    eachPicture($(what), work);
  });
}

// The server

async function state() {
  try {
    const answer = await call("ready", { cache: "no-store" });
    $("state").textContent = answer.ok ? "ready" : (await answer.json()).reason ?? "not ready";
    $("state").classList.toggle("ready", answer.ok);
  } catch {
    $("state").textContent = "the server cannot be reached";
    $("state").classList.remove("ready");
  }
}

$("keys").onclick = async () => { if (await askForKey()) start(); };

async function start() {
  await state();
  const answer = await call("v1/models");
  if (!answer.ok) return;
  const { data } = await answer.json();
  $("model").replaceChildren(...data.map(({ id }) => element("option", { value: id, textContent: id })));
}

start();
setInterval(() => { if (!document.hidden && !$("key-dialog").open) state(); }, 10000);
