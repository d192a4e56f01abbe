// The settings drawer: what is asked with each question. Kept in this browser, the system prompt with the conversation.
import { $, element } from "./dom.js";
import { call } from "./session.js";

const NUMBERS = ["temperature", "top_p", "seed", "max_tokens", "min_pixels", "max_pixels"];
const KEPT = "qvl-settings";
const listeners = [];
let known = [];
let preferred = null; // the model that was chosen last time, until the list is there

const number = (text) => (text.trim() === "" ? null : Number(text));

// {model, system, cache, temperature, …}: what was left empty is null, and the server's.
export function settings() {
  const told = { model: $("model").value || null, system: $("system").value.trim() || null, cache: $("cache").value };
  for (const name of NUMBERS) told[name] = number($(name).value);
  return told;
}

export function setSettings(told) {
  for (const name of NUMBERS) $(name).value = told[name] ?? "";
  $("system").value = told.system ?? "";
  $("cache").value = told.cache ?? "use";
  if (told.model && known.some(({ id }) => id === told.model)) $("model").value = told.model;
  changed();
}

// What is wrong with a field, in words, or null.
export function wrongSetting() {
  for (const name of NUMBERS) {
    const field = $(name);
    if (!field.checkValidity()) return `${field.labels[0].firstChild.textContent.trim()}: ${field.validationMessage}`;
  }
  return null;
}

export const onSettings = (listener) => listeners.push(listener);
export const models = () => known;

function changed() {
  const { system, ...kept } = settings();
  try {
    localStorage.setItem(KEPT, JSON.stringify(kept));
  } catch { /* a browser that keeps nothing asks with what stands there */ }
  showModel();
  listeners.forEach((listener) => listener());
}

function showModel() {
  const model = known.find(({ id }) => id === $("model").value);
  const able = model?.capabilities;
  const can = able && [
    able.vision ? `pictures (up to ${able.max_images} a request)` : null,
    model.max_model_len ? `${model.max_model_len.toLocaleString("en")} tokens of context` : null,
    able.tools ? "tools" : null,
    able.logprobs ? "probabilities" : null,
    able.response_formats.length ? `forms of answer: ${able.response_formats.join(", ")}` : null,
  ].filter(Boolean);
  $("can").replaceChildren(...(can ?? ["It is not loaded yet."]).map((text) => element("li", { textContent: text })));
  $("bundled").hidden = !model || (model.root !== "bundled" && model.parent !== "bundled");
}

export async function loadModels() {
  const answer = await call("v1/models");
  if (!answer.ok) return;
  const chosen = $("model").value || preferred;
  known = (await answer.json()).data;
  $("model").replaceChildren(...known.map(({ id }) => element("option", { value: id, textContent: id })));
  if (known.some(({ id }) => id === chosen)) $("model").value = chosen;
  changed();
}

function keptSettings() {
  try {
    return JSON.parse(localStorage.getItem(KEPT)) ?? {};
  } catch {
    return {};
  }
}

export function startSettings() {
  const kept = keptSettings();
  preferred = kept.model;
  setSettings(kept);
  $("settings-panel").addEventListener("input", changed);
  $("model").addEventListener("change", changed);
  $("settings-reset").onclick = () => setSettings({ model: $("model").value });
}
