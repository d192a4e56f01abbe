// Completion in a text of JSON Schema: types, formats and keywords, in a list below the text.
import { element } from "./dom.js";

const TYPES = ["string", "number", "integer", "boolean", "array", "object", "null"];
const FORMATS = ["box", "point", "date", "date-time", "email", "uri"];
const BLOCKS = {
  type: '"string"', description: '""', properties: "{}", required: "[]", items: '{"type": "string"}', enum: '[""]', format: '"box"',
  minimum: "0", maximum: "0", minItems: "0", maxItems: "10", maxLength: "100", pattern: '""', additionalProperties: "false", anyOf: "[]",
};

// What could stand at the end of `before`: {from, options: [{label, text}]}; `from` is where the typed part begins.
export function completions(before) {
  const value = /"(type|format)"\s*:\s*(?:\[[^\]]*)?"([\w-]*)$/.exec(before);
  if (value) {
    const known = (value[1] === "type" ? TYPES : FORMATS).filter((one) => one.startsWith(value[2]) && one !== value[2]);
    return { from: before.length - value[2].length, options: known.map((one) => ({ label: one, text: one })) };
  }
  const key = /[{,]\s*"(\w*)$/.exec(before);
  // Below "properties" stand the names of fields, which nobody else knows.
  if (key && !/"(properties|\$defs)"\s*:\s*\{\s*"\w*$/.test(before) && !inProperties(before)) {
    const known = Object.keys(BLOCKS).filter((one) => one.startsWith(key[1]) && one !== key[1]);
    return { from: before.length - key[1].length, options: known.map((one) => ({ label: one, text: `${one}": ${BLOCKS[one]}`, closes: true })) };
  }
  return { from: before.length, options: [] };
}

// Whether the innermost open brace is that of "properties".
function inProperties(before) {
  const stack = [];
  for (const found of before.matchAll(/"(?:[^"\\]|\\.)*"|[{}[\]]/g)) {
    if ("{[".includes(found[0])) stack.push(/"(properties|\$defs)"\s*:\s*$/.test(before.slice(0, found.index)));
    else if ("}]".includes(found[0])) stack.pop();
  }
  return stack.at(-1) === true;
}

export function complete(field, list) {
  let options = [];
  let from = 0;
  let chosen = 0;
  list.setAttribute("role", "listbox");

  function show() {
    list.replaceChildren(...options.map(({ label }, number) => element("li", {
      id: `${list.id}-${number}`, textContent: label, attributes: { role: "option", "aria-selected": String(number === chosen) },
      onpointerdown: (event) => { event.preventDefault(); chosen = number; take(); },
    })));
    list.hidden = !options.length;
    if (options.length) field.setAttribute("aria-activedescendant", `${list.id}-${chosen}`);
    else field.removeAttribute("aria-activedescendant");
  }
  function close() {
    options = [];
    show();
  }
  function take() {
    const { text, closes } = options[chosen];
    const end = field.selectionStart;
    // The quote that closes the key is part of what is put in.
    const skip = closes && field.value[end] === '"' ? 1 : 0;
    field.setRangeText(text, from, end + skip, "end");
    close();
    field.dispatchEvent(new Event("input", { bubbles: true }));
    close();
  }
  field.addEventListener("input", (event) => {
    // Not for what was put in by a program or taken away.
    if (event.inputType?.startsWith("delete") || !event.isTrusted) return;
    ({ from, options } = completions(field.value.slice(0, field.selectionStart)));
    chosen = 0;
    show();
  });
  field.addEventListener("keydown", (event) => {
    if (!options.length) return;
    const step = { ArrowDown: 1, ArrowUp: options.length - 1 }[event.key];
    if (step) chosen = (chosen + step) % options.length;
    else if (event.key === "Enter" || event.key === "Tab") take();
    else if (event.key === "Escape") close();
    else return;
    event.preventDefault();
    event.stopPropagation();
    if (step) show();
  });
  field.addEventListener("blur", close);
}
