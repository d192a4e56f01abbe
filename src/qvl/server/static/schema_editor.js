// What to read from a picture: the default fields, a table of own ones, or a JSON schema.
import { complete } from "./completion.js";
import { $, element } from "./dom.js";
import { fieldsOf, schemaOf, TYPES } from "./schema_fields.js";

const START = [{ name: "brand", type: "text", about: "", options: [], needed: true }, { name: "", type: "text", about: "", options: [], needed: false }];
let fields = START.map((field) => ({ ...field }));
let kind = "product";

// The schema as it stands: null for the default fields. What is wrong is thrown in words.
export function editedSchema() {
  if (kind === "product") return null;
  if (kind === "fields") return schemaOf(fields);
  return parsed($("schema").value);
}

export function setSchema(schema) {
  const told = schema && fieldsOf(schema);
  if (told) fields = told;
  $("schema").value = schema ? JSON.stringify(schema, null, 2) : "";
  choose(schema ? (told ? "fields" : "json") : "product");
}

function parsed(text) {
  if (!text.trim()) throw new Error('Write a schema: {"type": "object", "properties": {"brand": {"type": "string"}}}');
  let schema;
  try {
    schema = JSON.parse(text);
  } catch (error) {
    const at = /position (\d+)/.exec(error.message)?.[1];
    const line = at === undefined ? "" : `line ${text.slice(0, at).split("\n").length}: `;
    throw new Error(`The schema is not JSON: ${line}${error.message.replace(/ \(line \d+ column \d+\)$/, "")}`);
  }
  if (schema?.type !== "object") throw new Error('The schema must be of {"type": "object", …}.');
  return schema;
}

function choose(name) {
  kind = name;
  $("schema-kind").value = name;
  $("schema-fields").hidden = name !== "fields";
  $("schema-json").hidden = name !== "json";
  if (name === "fields") showFields();
  check();
}

function check() {
  let wrong = "";
  try {
    editedSchema();
  } catch (error) {
    wrong = error.message;
  }
  $("schema-wrong").textContent = wrong;
}

function showFields() {
  $("field-rows").replaceChildren(...fields.map((field, index) => {
    const set = (name) => (event) => { field[name] = event.target.value; check(); };
    const type = element("select", { ariaLabel: `Type of field ${index + 1}`, onchange: (event) => { field.type = event.target.value; showFields(); check(); } },
      ...TYPES.map((name) => element("option", { value: name, textContent: name, selected: name === field.type })));
    const listed = field.type === "one of" ? element("input", {
      type: "text", ariaLabel: `Values of field ${index + 1}`, placeholder: "red, blue, green", value: field.options.join(", "),
      oninput: (event) => { field.options = event.target.value.split(",").map((one) => one.trim()).filter(Boolean); check(); },
    }) : null;
    const away = element("button", { type: "button", className: "away", textContent: "×", ariaLabel: `Remove field ${index + 1}` });
    away.onclick = () => { fields.splice(index, 1); showFields(); check(); };
    const cell = (title, ...inside) => element("td", { data: { title } }, ...inside);
    return element("tr", {},
      cell("Field", element("input", { type: "text", ariaLabel: `Name of field ${index + 1}`, value: field.name, placeholder: "name", oninput: set("name") })),
      cell("Type", type, listed),
      cell("Meaning", element("input", { type: "text", ariaLabel: `What field ${index + 1} means`, value: field.about, placeholder: "what it means", oninput: set("about") })),
      cell("Must be told", element("input", { type: "checkbox", ariaLabel: `Field ${index + 1} must be told`, checked: field.needed, onchange: (event) => { field.needed = event.target.checked; check(); } })),
      cell("", away));
  }));
}

export function startSchemaEditor() {
  $("schema-kind").onchange = () => {
    const to = $("schema-kind").value;
    // Each form begins with what stands in the other.
    if (to === "json" && kind === "fields") {
      try {
        $("schema").value = JSON.stringify(schemaOf(fields), null, 2);
      } catch { /* nothing to begin with */ }
    }
    if (to === "fields" && kind === "json") {
      let told = null;
      try {
        told = fieldsOf(JSON.parse($("schema").value));
      } catch { /* said below */ }
      if (!told && $("schema").value.trim()) {
        choose("json");
        $("schema-wrong").textContent = "The table cannot show all that this schema says; edit it here.";
        return;
      }
      if (told) fields = told;
    }
    if (to === "json" && !$("schema").value.trim()) $("schema").value = JSON.stringify(schemaOf(START), null, 2);
    choose(to);
  };
  $("add-field").onclick = () => {
    fields.push({ name: "", type: "text", about: "", options: [], needed: false });
    showFields();
    $("field-rows").lastElementChild.querySelector("input").focus();
  };
  $("schema").addEventListener("input", check);
  complete($("schema"), $("schema-options"));
  choose("product");
}
