// Requests to this server, and answers as they come.
import { call, errorOf } from "./session.js";

// What each route takes of the settings, beside the model.
const FIELDS = {
  "v1/chat/completions": ["temperature", "top_p", "seed", "max_tokens", "max_pixels", "min_pixels"],
  "v1/analyze": ["temperature", "seed", "max_tokens", "max_pixels", "min_pixels"],
  "v1/locate": ["seed", "max_tokens", "max_pixels", "min_pixels"],
  "v1/decisions": [],
};
const CACHE = { use: null, fresh: "no-cache", off: "no-cache, no-store" };

export function requestBody(path, settings, fields) {
  const body = settings.model ? { model: settings.model } : {};
  for (const [name, value] of Object.entries(fields)) if (value !== undefined) body[name] = value;
  for (const name of FIELDS[path]) {
    if (settings[name] !== null && settings[name] !== undefined) body[name] = settings[name];
  }
  return body;
}

export const cacheControl = (settings) => CACHE[settings.cache ?? "use"];

export function post(path, body, settings, signal) {
  const headers = { "Content-Type": "application/json" };
  const control = cacheControl(settings);
  if (control) headers["Cache-Control"] = control;
  return call(path, { method: "POST", headers, body: JSON.stringify(body), signal });
}

function refused(answer, message) {
  const wait = Number(answer.headers.get("retry-after"));
  return Object.assign(new Error(message), { status: answer.status, wait: Number.isFinite(wait) ? wait : 0 });
}

// One answer as JSON: {found, cache, ms}. Errors have the `status`, or `lost` where there was no answer.
export async function askJson(path, body, settings, signal) {
  const started = performance.now();
  const answer = await post(path, body, settings, signal);
  if (!answer.ok) throw refused(answer, await errorOf(answer));
  let found;
  try {
    found = await answer.json();
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw cutOff();
  }
  return { found, cache: answer.headers.get("x-qvl-cache"), ms: performance.now() - started };
}

const cutOff = () => Object.assign(
  new Error("The connection was lost before the answer had ended. What came is kept; ask again for all of it."), { lost: true });

async function* events(answer) {
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    let piece;
    try {
      piece = await reader.read();
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw cutOff();
    }
    if (piece.done) throw cutOff();
    held += piece.value;
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

export function chatBody(settings, messages) {
  return requestBody("v1/chat/completions", settings, { messages });
}

// Asks a conversation. `told(answer)` is called with what there is so far: {text, reasoning, cache, usage, ended, first, ms}.
export async function askChat(settings, messages, told, signal) {
  const started = performance.now();
  const body = { ...chatBody(settings, messages), stream: true, stream_options: { include_usage: true } };
  const answer = await post("v1/chat/completions", body, settings, signal);
  if (!answer.ok) throw refused(answer, await errorOf(answer));
  const found = { text: "", reasoning: "", cache: answer.headers.get("x-qvl-cache") };
  for await (const piece of events(answer)) {
    if (piece.error) throw new Error(piece.error.message);
    found.usage = piece.usage ?? found.usage;
    const choice = piece.choices[0];
    found.ended = choice?.finish_reason ?? found.ended;
    const { content, reasoning_content: thought } = choice?.delta ?? {};
    if (!content && !thought) continue;
    found.first ??= performance.now() - started;
    found.text += content ?? "";
    found.reasoning += thought ?? "";
    found.ms = performance.now() - started;
    told(found);
  }
  found.ms = performance.now() - started;
  told(found);
  return found;
}
