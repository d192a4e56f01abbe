import { $, askForKey, call, errorOf } from "./session.js";

const pictures = []; // {name, url}: data URLs, in the order in which they will be sent
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
    reader.onload = () => resolve({ name: file.name || "pasted", url: reader.result });
    reader.onerror = () => reject(reader.error);
    reader.readAsDataURL(file);
  });
}

async function add(files) {
  const wanted = [...files].filter((file) => file.type.startsWith("image/"));
  pictures.push(...(await Promise.all(wanted.map(readFile))));
  showPictures();
  if (files.length && !wanted.length) fail("That is no picture.");
}

function showPictures() {
  $("pictures").replaceChildren(...pictures.map((picture, index) => {
    const remove = element("button", { type: "button", textContent: "×", ariaLabel: `Remove ${picture.name}` });
    remove.onclick = (event) => {
      event.stopPropagation();
      pictures.splice(index, 1);
      showPictures();
      $("drop").focus();
    };
    return element("li", {}, element("img", { src: picture.url, alt: picture.name }), remove);
  }));
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
$("files").addEventListener("change", async () => { await add($("files").files); $("files").value = ""; });
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

const tabs = [$("tab-ask"), $("tab-analyze")];
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
    const other = tabs[(tabs.indexOf(tab) + 1) % tabs.length];
    choose(other);
    other.focus();
  };
}

// Answers

function begin(button) {
  under_way?.abort();
  under_way = new AbortController();
  $("error").hidden = true;
  $("answer").replaceChildren();
  $("answer").classList.add("busy");
  $("facts").replaceChildren();
  button.disabled = true;
  return { started: performance.now(), signal: under_way.signal };
}

function end(button) {
  $("answer").classList.remove("busy");
  button.disabled = false;
}

function fail(message) {
  // The server names a picture by its place in the request; people know it by its name.
  const named = message.replace(/^(?:messages\[0\]\.content|images)\[(\d+)\](?:\.image_url)?/,
    (place, index) => pictures[index]?.name ?? place);
  $("error").textContent = named;
  $("error").hidden = false;
}

function facts(found) {
  $("facts").replaceChildren(...Object.entries(found).filter(([, value]) => value !== undefined && value !== null)
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
      const data = part.replace(/^data: /, "");
      if (data === "[DONE]") return;
      yield JSON.parse(data);
    }
  }
}

async function guarded(button, work) {
  const run = begin(button);
  try {
    await work(run);
  } catch (error) {
    if (error.name !== "AbortError") fail(error.message);
  } finally {
    end(button);
  }
}

$("panel-ask").addEventListener("submit", (event) => {
  event.preventDefault();
  guarded($("send"), async ({ started, signal }) => {
    const text = $("question").value.trim() || $("question").placeholder;
    const content = [...pictures.map(({ url }) => ({ type: "image_url", image_url: { url } })), { type: "text", text }];
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
    remember($("answer").textContent, total, cache, pictures[0]);
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

$("panel-analyze").addEventListener("submit", (event) => {
  event.preventDefault();
  if (!pictures.length) return fail("Add a picture first.");
  guarded($("analyze"), async ({ started, signal }) => {
    const answer = await post("v1/analyze", {
      model: $("model").value || undefined,
      images: pictures.map(({ url }) => url),
      language: $("language").value,
    }, $("fresh-analysis").checked, signal);
    if (!answer.ok) throw new Error(await errorOf(answer));
    const found = await answer.json();
    const cache = answer.headers.get("x-qvl-cache");
    const rows = leaves(found.analysis).map((leaf) => field(leaf, found.field_confidence[leaf[0]]));
    $("answer").replaceChildren(...rows, field(["all together", ""], found.confidence));
    const total = performance.now() - started;
    facts({ cache, total: seconds(total), tokens: tokens(found.usage) });
    remember(Object.values(found.analysis).filter((value) => typeof value === "string").join(", "), total, cache, pictures[0]);
  });
});

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
