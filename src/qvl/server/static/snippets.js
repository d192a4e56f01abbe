// A request as code that runs as pasted: curl, Python with qvl, Python with openai, JavaScript. Plain functions of plain values.

const MARK = "\u0000"; // begins a string that stands for a name of the code

// `request` is {path, body, settings, control, key, base}: the base URL ends with /v1.
export const LANGUAGES = { curl, "Python (qvl)": pythonQvl, "Python (openai)": pythonOpenai, JavaScript: javascript };

// The body with names in place of its pictures, and the pictures by name.
function lifted(body, nameOf) {
  const pictures = new Map();
  const walk = (value) => {
    if (typeof value === "string" && value.startsWith("data:")) {
      if (!pictures.has(value)) pictures.set(value, nameOf(pictures.size + 1));
      return MARK + pictures.get(value);
    }
    if (Array.isArray(value)) return value.map(walk);
    if (value && typeof value === "object") return Object.fromEntries(Object.entries(value).map(([name, inner]) => [name, walk(inner)]));
    return value;
  };
  const lean = walk(body);
  return { lean, pictures: [...pictures].map(([url, name]) => [name, url]) };
}

function literal(value, words, level = 0) {
  const inside = "    ".repeat(level + 1);
  const end = `${"    ".repeat(level)}`;
  if (value === null || value === undefined) return words.none;
  if (typeof value === "boolean") return value ? words.yes : words.no;
  if (typeof value === "string") return value.startsWith(MARK) ? value.slice(1) : JSON.stringify(value);
  if (typeof value !== "object") return String(value);
  const parts = Array.isArray(value) ? value.map((inner) => literal(inner, words, level + 1))
    : Object.entries(value).map(([name, inner]) => `${JSON.stringify(name)}: ${literal(inner, words, level + 1)}`);
  const [open, close] = Array.isArray(value) ? "[]" : "{}";
  const short = `${open}${parts.join(", ")}${close}`;
  if (short.length + end.length <= 90 && !short.includes("\n")) return short;
  return `${open}\n${parts.map((part) => `${inside}${part},\n`).join("")}${end}${close}`;
}

const PYTHON = { none: "None", yes: "True", no: "False" };
const SCRIPT = { none: "null", yes: "true", no: "false" };
const named = (fields, level = 0) => Object.entries(fields).filter(([, value]) => value !== undefined && value !== null)
  .map(([name, value]) => `${"    ".repeat(level)}${name}=${literal(value, PYTHON, level)},\n`).join("");

export function curl({ path, body, control, key, base }) {
  const lines = [
    `curl ${base.replace(/\/v1$/, "")}/${path}`, "-H 'Content-Type: application/json'",
    ...(key ? ['-H "Authorization: Bearer $QVL_API_KEY"'] : []),
    ...(control ? [`-H 'Cache-Control: ${control}'`] : []),
    "--data-binary @- <<'JSON'",
  ];
  return `${lines.join(" \\\n  ")}\n${JSON.stringify(body, null, 2)}\nJSON\n`;
}

export function javascript({ path, body, control, key, base }) {
  const { lean, pictures } = lifted(body, (number) => `picture${number}`);
  const headers = {
    "Content-Type": "application/json",
    ...(key && { Authorization: `${MARK}\`Bearer \${globalThis.process?.env.QVL_API_KEY ?? prompt("API key")}\`` }),
    ...(control && { "Cache-Control": control }),
  };
  // Node prints objects inside of objects as [Object].
  const told = path === "v1/chat/completions" ? "(await answer.json()).choices[0].message.content" : "JSON.stringify(await answer.json(), null, 2)";
  return [
    "// In a module (node file.mjs), or in the console of this server's page.",
    ...pictures.map(([name, url]) => `const ${name} = ${JSON.stringify(url)};`),
    `const answer = await fetch(${JSON.stringify(`${base.replace(/\/v1$/, "")}/${path}`)}, {`,
    '  method: "POST",',
    `  headers: ${literal(headers, SCRIPT)},`,
    `  body: JSON.stringify(${literal(lean, SCRIPT)}),`,
    "});",
    "if (!answer.ok) throw new Error(await answer.text());",
    `console.log(${told});`,
    "",
  ].join("\n");
}

export function pythonOpenai({ path, body, control, key, base }) {
  const { lean, pictures } = lifted(body, (number) => `picture_${number}`);
  const head = [
    ...(key ? ["import os", ""] : []), "from openai import OpenAI", "",
    `client = OpenAI(base_url=${JSON.stringify(base)}, api_key=${key ? 'os.environ["QVL_API_KEY"]' : '"none"'})`,
    ...pictures.map(([name, url]) => `${name} = ${JSON.stringify(url)}`),
  ].join("\n");
  const headers = control ? { "Cache-Control": control } : null;
  if (path === "v1/chat/completions") {
    const { max_pixels: most, min_pixels: least, ...plain } = lean;
    const extra = { ...(most && { max_pixels: most }), ...(least && { min_pixels: least }) };
    const fields = { ...plain, extra_body: Object.keys(extra).length ? extra : null, extra_headers: headers };
    return `${head}\nanswer = client.chat.completions.create(\n${named(fields, 1)})\nprint(answer.choices[0].message.content)\n`;
  }
  // A route that the client has no method for.
  const options = headers ? `    options={"headers": ${literal(headers, PYTHON)}},\n` : "";
  return `${head}\nanswer = client.post(\n    ${JSON.stringify(path.replace(/^v1/, ""))},\n    cast_to=object,\n`
    + `    body=${literal(lean, PYTHON, 1)},\n${options})\nprint(answer)\n`;
}

const CACHE = { "no-cache": "refresh", "no-cache, no-store": "off" };

export function pythonQvl({ path, body, control, key, base }) {
  const { lean, pictures } = lifted(body, (number) => `picture_${number}`);
  const { model, messages, image, targets, schema, input, questions, abstain, ...params } = lean;
  const kinds = { predicate: "Predicate", choice: "Choice", score: "Score" };
  const used = [...new Set((questions ?? []).map(({ type }) => kinds[type]))].sort();
  const opened = `Pipeline(${JSON.stringify(`openai:${model ?? "default"}`)}, base_url=${JSON.stringify(base)}${key ? ', api_key=os.environ["QVL_API_KEY"]' : ""})`;
  const given = { ...params, ...(CACHE[control] && { cache: CACHE[control] }) };
  const source = literal(image, PYTHON, 2);
  const told = ["answer.field_confidence", ...(params.evidence ? ["answer.evidence"] : [])].join(", ");
  const calls = {
    "v1/chat/completions": () => `    answer = pipe.chat(\n        ${literal(messages, PYTHON, 2)},\n${named(given, 2)}    )\n    print(answer.text)\n`,
    "v1/analyze": () => `    answer = pipe.analyze${schema ? "_result" : ""}(\n        ${source},\n${named({ schema, ...given }, 2)}    )\n    print(answer${schema ? ".value" : ""}, ${told})\n`,
    "v1/locate": () => `    located = pipe.locate(\n        ${source},\n        ${literal(targets, PYTHON, 2)},\n${named(given, 2)}    )\n    for found in located:\n        print(found.label, found.box or found.point, found.confidence)\n    print(len(located), "located")\n`,
    "v1/decisions": () => `    answers = pipe.decide(\n        ${literal(sourcesOf(input), PYTHON, 2)},\n        [\n${(questions ?? []).map((one) => `            ${asQuestion(one, kinds)},\n`).join("")}        ],\n${named({ context: textOf(input), ...given }, 2)}    )\n    for answer in answers:\n        print(answer.name, answer.value, answer.probabilities)\n`,
  };
  return [
    ...(abstain === undefined ? [] : [
      `# Told is everything: that nothing below ${abstain} is told is the server's, by its calibration.`,
      "# Pipeline(calibration=…, abstain=…) does it with a model of its own.", ""]),
    ...(key ? ["import os", ""] : []), "from qvl import Pipeline",
    ...(used.length ? [`from qvl.decisions import ${used.join(", ")}`] : []), "",
    ...pictures.map(([name, url]) => `${name} = ${JSON.stringify(url)}`), ...(pictures.length ? [""] : []),
    `with ${opened} as pipe:`, calls[path](),
  ].join("\n");
}

// The text of a question, beside its pictures.
function textOf(input) {
  const texts = input.flatMap(({ content }) => content).filter(({ type }) => type === "input_text").map(({ text }) => text);
  return texts.length ? texts.join("\n") : null;
}

function sourcesOf(input) {
  return input.flatMap(({ content }) => content).filter(({ type }) => type === "input_image").map((part) => part.image_url);
}

function asQuestion(question, kinds) {
  const { type, name, instructions, choices, levels } = question;
  const options = (choices ?? levels)?.map((one) => one.value ?? one.label);
  return `${kinds[type]}(${JSON.stringify(instructions)}${options ? `, ${literal(options, PYTHON, 3)}` : ""}${name ? `, name=${JSON.stringify(name)}` : ""})`;
}
