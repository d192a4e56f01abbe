// The same as common.py, for clients of Node: the server, a picture, and a report of what worked.
import { readFileSync } from "node:fs";
import { createRequire } from "node:module";

export const [URL, MODEL, FILE] = process.argv.slice(2);
export const PICTURE = readFileSync(FILE);
export const DATA_URL = `data:image/png;base64,${PICTURE.toString("base64")}`;
export const QUESTION = "What brand is it?";
export const BRAND = "NORVIK";
export const TEXT = "I need a picture.";
export const SIZES = ["small", "large"];
export const SCHEMA = {
  type: "object",
  properties: { size: { type: "string", enum: SIZES } },
  required: ["size"],
  additionalProperties: false,
};

export function check(text, wanted) {
  if (String(text).trim() !== wanted) throw new Error(`${JSON.stringify(text)} instead of ${wanted}`);
}

export function picked(value) {
  if (!SIZES.includes(value?.size)) throw new Error(`${JSON.stringify(value)} has no size`);
}

export async function fails(call, status, word = "nope") {
  try {
    await call();
  } catch (error) {
    const found = error.status ?? error.statusCode;
    if (found !== status || !String(error.message).includes(word)) throw error;
    return;
  }
  throw new Error("no error");
}

export async function run(name, features) {
  const results = {};
  for (const [feature, attempt] of Object.entries(features)) {
    try {
      await attempt();
      results[feature] = "ok";
    } catch (error) {
      results[feature] = String(error?.stack ?? error).slice(-1500);
    }
  }
  const path = createRequire(`${process.cwd()}/`).resolve(name);
  const root = path.slice(0, path.lastIndexOf(`node_modules/${name}/`)) + `node_modules/${name}/package.json`;
  console.log("\n" + JSON.stringify({ version: JSON.parse(readFileSync(root)).version, results }));
}
