// Errors in words of the page: the server names a picture by its place in the request, or by the kind of its data.

const PLACE = /^(?:image|(?:messages|input)\[\d+\]\.content\[\d+\](?:\.(?:image|video)_url)?): /;
const DATA = /data:(?:image|video|application)\/[\w.+-]+/g;

// `message` about the one picture that `name` is.
export function withName(message, name) {
  const about = message.replace(PLACE, "").replace(DATA, (kind) => (name.startsWith(kind) ? kind : name));
  return about.startsWith(name) || about === message || name.startsWith("data:") ? about : `${name}: ${about}`;
}

// `message` about a conversation: `said` are its turns as they were sent, behind `before` messages.
export function withNames(message, said, before = 0) {
  const pictures = said.flatMap((turn) => turn.pictures ?? []);
  const at = /^messages\[(\d+)\]\.content\[(\d+)\]/.exec(message);
  const named = at ? said[at[1] - before]?.pictures?.[at[2]] : pictures.length === 1 ? pictures[0] : null;
  return named ? withName(message, named.name) : message;
}
