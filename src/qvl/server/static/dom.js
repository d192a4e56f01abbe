// Elements and their small helpers. Text is always set as text: no string of a model becomes HTML.

export const $ = (id) => document.getElementById(id);

// A new element. `data` are its data-* attributes, `attributes` what has no property; children may be null.
export function element(tag, { data = {}, attributes = {}, ...fields } = {}, ...children) {
  const made = Object.assign(document.createElement(tag), fields);
  Object.assign(made.dataset, data);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children.filter((child) => child !== null && child !== undefined));
  return made;
}

export function svg(tag, attributes = {}, ...children) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

export function button(text, onclick, fields = {}) {
  return element("button", { type: "button", className: "quiet", textContent: text, onclick, ...fields });
}

// A button that copies what `text()` gives, and says that it has.
export function copyButton(label, text, fields = {}) {
  const made = button(label, async () => {
    try {
      await writeClipboard(await text());
      made.textContent = "Copied";
    } catch (error) {
      made.textContent = `Not copied: ${error.message}`;
    }
    setTimeout(() => { made.textContent = label; }, 1500);
  }, { ...fields, className: `quiet copy ${fields.className ?? ""}` });
  return made;
}

// Pages that are not from this machine and not over TLS have no navigator.clipboard.
async function writeClipboard(text) {
  if (navigator.clipboard) return navigator.clipboard.writeText(text);
  const held = element("textarea", { value: text, className: "unseen" });
  // Outside of an open dialog nothing can be selected.
  (document.querySelector("dialog[open]") ?? document.body).append(held);
  held.select();
  const done = document.execCommand("copy");
  held.remove();
  if (!done) throw new Error("the browser refuses");
  return undefined;
}

export function download(name, type, ...parts) {
  const url = URL.createObjectURL(new Blob(parts, { type }));
  const link = element("a", { href: url, download: name });
  document.body.append(link);
  link.click();
  link.remove();
  setTimeout(() => URL.revokeObjectURL(url), 60000);
}

// A definition list of what is known; what is undefined, null or "" is left out.
export function facts(found, fields = {}) {
  const known = Object.entries(found).filter(([, value]) => value !== undefined && value !== null && value !== "");
  return element("dl", { className: "facts", ...fields }, ...known.map(([name, value]) =>
    element("div", {}, element("dt", { textContent: name }), element("dd", { textContent: value }))));
}

export const seconds = (ms) => (ms < 1000 ? `${Math.round(ms)} ms` : `${(ms / 1000).toFixed(2)} s`);

export function tokens(usage) {
  if (!usage) return undefined;
  const images = usage.prompt_tokens_details?.image_tokens;
  return `${usage.prompt_tokens} in${images ? ` (${images} picture)` : ""}, ${usage.completion_tokens} out`;
}

export function fail(message) {
  $("error").textContent = message;
  $("error").hidden = !message;
  if (message) $("error").scrollIntoView({ block: "nearest" });
}

export const sleep = (ms, signal) => new Promise((resolve, reject) => {
  const timer = setTimeout(resolve, ms);
  signal?.addEventListener("abort", () => { clearTimeout(timer); reject(signal.reason); }, { once: true });
});
