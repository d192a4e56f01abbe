// What a conversation is: {id, title, created, settings, turns}, and its forms for the API and for sharing.
// A turn is {role: "user", text, pictures} or {role: "assistant", text, reasoning, told, failed}.
import { withNames as named } from "./names.js";
import { measure } from "./pictures.js";
import { partOf } from "./video_strip.js";

const FORM = "qvl-conversation";

export function fresh() {
  return { id: crypto.randomUUID?.() ?? `${Date.now()}-${Math.random()}`, kind: "chat", created: Date.now(), settings: {}, turns: [] };
}

function userContent(turn) {
  if (!turn.pictures.length) return turn.text;
  return [...turn.pictures.map(({ url }) => partOf(url)), { type: "text", text: turn.text }];
}

// The turns as messages of the API; a turn that failed with nothing said is no message.
export function messagesOf(turns, system) {
  const said = turns.filter((turn) => turn.role === "user" || turn.text);
  return [
    ...(system ? [{ role: "system", content: system }] : []),
    ...said.map((turn) => ({ role: turn.role, content: turn.role === "user" ? userContent(turn) : turn.text })),
  ];
}

export const withNames = (message, turns, system) =>
  named(message, turns.filter((turn) => turn.role === "user" || turn.text), system ? 1 : 0);

export const titleOf = (conversation) => conversation.turns.find(({ role }) => role === "user")?.text.slice(0, 120) ?? "";

export function toShared(conversation) {
  const { system, ...settings } = conversation.settings;
  return {
    format: FORM,
    version: 1,
    title: titleOf(conversation),
    created: new Date(conversation.created).toISOString(),
    settings,
    picture_names: conversation.turns.map((turn) => (turn.pictures ?? []).map(({ name }) => name)),
    reasoning: conversation.turns.map((turn) => turn.reasoning ?? ""),
    // As the API takes them.
    messages: messagesOf(conversation.turns.map((turn) => ({ ...turn, text: turn.text || " " })), system),
  };
}

const wrong = (what) => new Error(`This is not a conversation of this page: ${what}.`);

// Reads what toShared wrote. A foreign file is refused in words; pictures must be in it.
export async function fromShared(text) {
  let shared;
  try {
    shared = JSON.parse(text);
  } catch (error) {
    throw wrong(`it is not JSON (${error.message})`);
  }
  if (shared?.format !== FORM) throw wrong(`its "format" is not "${FORM}"`);
  if (shared.version !== 1) throw wrong(`its version is ${JSON.stringify(shared.version)}, and this page reads 1`);
  if (!Array.isArray(shared.messages)) throw wrong("it has no messages");
  const found = { ...fresh(), settings: { ...plainSettings(shared.settings) } };
  shared.messages.forEach((message, index) => {
    if (message?.role === "system" && index === 0) {
      found.settings.system = String(message.content);
      return;
    }
    if (!["user", "assistant"].includes(message?.role)) throw wrong(`message ${index} has the role ${JSON.stringify(message?.role)}`);
    const place = found.turns.length;
    const parts = typeof message.content === "string" ? [{ type: "text", text: message.content }] : message.content;
    if (!Array.isArray(parts)) throw wrong(`message ${index} has no content`);
    const text = parts.filter(({ type }) => type === "text").map((part) => String(part.text)).join("\n");
    const urls = parts.filter(({ type }) => /^(image|video)_url$/.test(type)).map((part) => String(part[part.type]?.url));
    const foreign = urls.find((url) => !/^data:(image|video)\/[\w.+-]+;base64,/.test(url));
    if (foreign !== undefined) throw wrong(`message ${index} has a picture that is not in the file: ${foreign.slice(0, 80)}`);
    const names = shared.picture_names?.[place];
    const pictures = urls.map((url, number) => ({ name: String(names?.[number] ?? `picture ${number + 1}`), url }));
    found.turns.push(message.role === "user" ? { role: "user", text, pictures }
      : { role: "assistant", text, reasoning: String(shared.reasoning?.[place] ?? "") });
  });
  if (!found.turns.length) throw wrong("it has no messages");
  await Promise.all(found.turns.flatMap((turn) => turn.pictures ?? []).map(measure));
  return found;
}

function plainSettings(given) {
  const numbers = ["temperature", "top_p", "seed", "max_tokens", "min_pixels", "max_pixels"];
  const known = Object.fromEntries(numbers.filter((name) => Number.isFinite(given?.[name])).map((name) => [name, given[name]]));
  if (typeof given?.model === "string") known.model = given.model;
  return known;
}
