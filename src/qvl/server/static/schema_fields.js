// A JSON schema as a table of fields, and back. Plain functions.

const SCALARS = { text: { type: "string" }, number: { type: "number" }, "whole number": { type: "integer" }, "yes or no": { type: "boolean" } };
export const TYPES = [...Object.keys(SCALARS), "one of", "list of texts", "list of numbers", "box", "point"];

// A field is {name, type, about, needed}: of "one of" `about` lists the values, behind a colon there may be a description.
function typeOf({ type, options, about }) {
  const described = about ? { description: about } : {};
  if (type === "one of") return { enum: options, ...described };
  if (type === "box" || type === "point") return { format: type, ...described };
  if (type === "list of texts") return { type: "array", items: { type: "string" }, ...described };
  if (type === "list of numbers") return { type: "array", items: { type: "number" }, ...described };
  return { ...SCALARS[type], ...described };
}

// The schema of the fields. What is wrong is thrown in words.
export function schemaOf(fields) {
  const named = fields.filter(({ name }) => name.trim());
  if (!named.length) throw new Error("Name at least one field.");
  const properties = {};
  for (const field of named) {
    const name = field.name.trim();
    if (name in properties) throw new Error(`Two fields are named ${name}.`);
    if (field.type === "one of" && field.options.length < 2) throw new Error(`${name}: list its values, with commas between.`);
    properties[name] = typeOf(field);
  }
  const needed = named.filter((field) => field.needed).map(({ name }) => name.trim());
  return { type: "object", properties, ...(needed.length && { required: needed }), additionalProperties: false };
}

function fieldType(schema) {
  if (Array.isArray(schema.enum) && schema.enum.every((one) => typeof one === "string")) return "one of";
  if (schema.format === "box" || schema.format === "point") return schema.format;
  if (schema.type === "array" && schema.items?.type === "string") return "list of texts";
  if (schema.type === "array" && schema.items?.type === "number") return "list of numbers";
  return Object.keys(SCALARS).find((name) => SCALARS[name].type === schema.type);
}

// The fields of a schema, or null if it says more than a table can show.
export function fieldsOf(schema) {
  if (schema?.type !== "object" || !schema.properties) return null;
  const fields = Object.entries(schema.properties).map(([name, one]) => ({
    name, type: fieldType(one), about: one.description ?? "", options: one.enum ?? [], needed: (schema.required ?? []).includes(name),
  }));
  if (fields.some(({ type }) => !type)) return null;
  // Written back, it must be the same.
  const sorted = (value) => JSON.stringify(value, (_, inner) => (inner && typeof inner === "object" && !Array.isArray(inner)
    ? Object.fromEntries(Object.entries(inner).sort(([a], [b]) => (a < b ? -1 : 1))) : inner));
  const again = fields.length ? schemaOf(fields) : null;
  return again && sorted({ additionalProperties: false, ...schema }) === sorted(again) ? fields : null;
}
