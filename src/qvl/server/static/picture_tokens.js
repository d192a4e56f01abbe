// How many tokens a picture will take: asked of the server, whose model knows, else reckoned by Qwen3-VL's rule.
import { call } from "./session.js";
import { settings } from "./settings.js";

const EDGE = 32; // pixels of a token's edge
const LEAST = 65536;
const LEAST_ASKED = 4 * EDGE * EDGE;
const MOST = 2621440;
const known = new Map(); // of a picture's url: by model and limits
const cannot = new Set(); // models that do not tell

export function reckoned(width, height, least = null, most = null) {
  const low = least === null ? LEAST : Math.max(least, LEAST_ASKED);
  const high = Math.min(most ?? MOST, MOST);
  let rows = Math.round(height / EDGE) * EDGE;
  let columns = Math.round(width / EDGE) * EDGE;
  if (rows * columns > high) {
    const by = Math.sqrt((height * width) / high);
    rows = Math.floor(height / by / EDGE) * EDGE;
    columns = Math.floor(width / by / EDGE) * EDGE;
  } else if (rows * columns < low) {
    const by = Math.sqrt(low / (height * width));
    rows = Math.ceil((height * by) / EDGE) * EDGE;
    columns = Math.ceil((width * by) / EDGE) * EDGE;
  }
  return (Math.max(rows, EDGE) * Math.max(columns, EDGE)) / EDGE ** 2;
}

// "63 tokens" by the model's own count, "about 300 tokens" by the rule.
export async function pictureTokens(picture) {
  const { model, min_pixels: least, max_pixels: most } = settings();
  const about = `about ${reckoned(picture.width, picture.height, least, most)} tokens`;
  if (cannot.has(model)) return about;
  const name = `${model}|${least}|${most}`;
  if (!known.has(picture.url)) known.set(picture.url, new Map());
  const told = known.get(picture.url);
  if (!told.has(name)) told.set(name, counted(picture, model, least, most));
  const count = await told.get(name);
  return count === null ? about : `${count} tokens`;
}

async function counted(picture, model, least, most) {
  const part = { type: "image_url", image_url: { url: picture.url } };
  if (least !== null) part.min_pixels = least;
  if (most !== null) part.max_pixels = most;
  try {
    const answer = await call("tokenize", {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify({ ...(model && { model }), messages: [{ role: "user", content: [part] }] }),
    });
    if (answer.ok) return longestRun((await answer.json()).tokens);
    const { error } = await answer.json();
    // Another picture may be countable; a backend that has no tokens will not have any later.
    if (error.code === "unsupported_parameter") cannot.add(model);
  } catch { /* the question itself will say what is wrong */ }
  return null;
}

// A picture is a row of one and the same token.
function longestRun(ids) {
  let most = 0;
  let run = 0;
  ids.forEach((id, index) => {
    run = id === ids[index - 1] ? run + 1 : 1;
    most = Math.max(most, run);
  });
  return most;
}
