// What can be asked of each picture by itself: its request, its row in a table, and its view.
import { requestBody } from "./api.js";
import { $, element, facts, seconds, tokens } from "./dom.js";
import { decided, decisionView } from "./decision_view.js";
import { analysisView, bar, fieldRows, locatedView, shownValue, why } from "./fields_view.js";
import { editedQuestions, setQuestions } from "./questions_editor.js";
import { editedSchema, setSchema } from "./schema_editor.js";
import { posterOf } from "./video_strip.js";

const MOST_COLUMNS = 60;
const withBar = (value, sure, name, calibrated) => [element("span", { textContent: value }),
  ...(Number.isFinite(sure) ? [bar(sure, name, calibrated)] : [])];
const answeredFrom = ({ found, cache }) => (found ? (cache === "hit" ? "from the cache" : "answered") : "…");
const listed = () => ($("targets").value.trim() || $("targets").placeholder).split("\n").map((line) => line.trim()).filter(Boolean);

// `form()` reads what was asked (throws in words), `fill(form)` shows it again, `body(form, url)` is the request of one picture.
export const KINDS = {
  analyze: {
    path: "v1/analyze",
    title: ({ schema }) => (schema ? `fields: ${Object.keys(schema.properties ?? {}).join(", ")}` : "brand, category, attributes"),
    form: () => ({ schema: editedSchema(), language: $("language").value, evidence: $("where").checked, abstain: $("abstain").value }),
    fill({ schema, language, evidence, abstain }) {
      setSchema(schema);
      $("language").value = language;
      $("where").checked = evidence;
      $("abstain").value = abstain ?? "";
    },
    body: (form, url) => ({
      image: url, language: form.language, evidence: form.evidence || undefined, schema: form.schema ?? undefined,
      abstain: form.abstain ? Number(form.abstain) : undefined,
    }),
    draws: ({ schema, evidence }) => evidence || /"format":"(box|point)"/.test(JSON.stringify(schema)),
    view: (picture, found) => analysisView(picture, found),
    columns: (rows) => [...new Set(rows.flatMap(({ found }) => (found ? fieldRows(found).map(({ path }) => path) : [])))]
      .slice(0, MOST_COLUMNS).map((path) => {
        const of = (row) => row.found && fieldRows(row.found).find((one) => one.path === path);
        return {
          name: path,
          value: (row) => { const field = of(row); return typeof field?.value === "object" && field.value ? shownValue(field.value) : field?.value; },
          cell: (row) => {
            const field = of(row);
            if (!field) return "";
            if (field.untold) return element("span", { className: "untold", textContent: "cannot tell", title: why(field.untold) });
            return withBar(shownValue(field.value), field.sure, path, row.found.confidence_method === "calibrated");
          },
        };
      }).concat({
        name: "confidence",
        value: (row) => row.found?.confidence,
        cell: (row) => (Number.isFinite(row.found?.confidence)
          ? bar(row.found.confidence, "all together", row.found.confidence_method === "calibrated") : ""),
      }),
  },
  locate: {
    path: "v1/locate",
    title: ({ targets }) => targets.join(", "),
    form: () => ({ targets: listed(), points: $("points").checked }),
    fill({ targets, points }) {
      $("targets").value = targets.join("\n");
      $("points").checked = points;
    },
    body: ({ targets, points }, url) => ({ image: url, targets, points: points || undefined }),
    draws: () => true,
    view: (picture, found) => locatedView(picture, found),
    columns: () => [
      { name: "located", value: ({ found }) => found?.located.length, cell: ({ found }) => String(found?.located.length ?? "") },
      { name: "what", value: ({ found }) => found?.located.map(({ label }) => label).join(", "), cell: ({ found }) => found?.located.map(({ label }) => label).join(", ") ?? "" },
    ],
  },
  decide: {
    path: "v1/decisions",
    title: ({ questions }) => questions.map(({ instructions }) => instructions).join(" "),
    form: () => ({ questions: editedQuestions(), about: $("about").value.trim() }),
    fill({ questions, about }) {
      setQuestions(questions);
      $("about").value = about;
    },
    body: ({ questions, about }, url) => ({
      input: [{
        role: "user",
        content: [...(url ? [{ type: "input_image", image_url: url }] : []), ...(about ? [{ type: "input_text", text: about }] : [])],
      }],
      questions,
    }),
    // A text alone can be asked about.
    without: ({ about }) => about !== "",
    view: (picture, found, { questions }) => decisionView(picture, found, questions),
    columns: (rows, { questions }) => questions.map(({ instructions }, index) => ({
      name: instructions,
      value: ({ found }) => found && decided(found.answers[index]).said,
      cell: ({ found }) => {
        if (!found) return "";
        const { said, sure } = decided(found.answers[index]);
        return withBar(said, sure, instructions, false);
      },
    })),
  },
};

// Columns of every kind: the picture first, what it took last.
export function columnsOf(kind, rows, form) {
  return [
    {
      name: "picture",
      value: (row) => row.picture.name,
      cell: (row) => [row.picture.url ? element("img", { src: posterOf(row.picture), alt: "" }) : "",
        element("button", { type: "button", className: "link", textContent: row.picture.name })],
    },
    ...KINDS[kind].columns(rows, form),
    {
      name: "state",
      value: (row) => (row.failed ? `failed: ${row.failed}` : answeredFrom(row)),
      cell: (row) => (row.failed ? element("span", { className: "failed", textContent: row.failed }) : answeredFrom(row)),
    },
    { name: "ms", value: (row) => (row.ms ? Math.round(row.ms) : null), cell: (row) => (row.ms ? seconds(row.ms) : "") },
  ];
}

export const bodyOf = (kind, settings, form, url) => requestBody(KINDS[kind].path, settings, KINDS[kind].body(form, url));

// One result in full.
export function detail(kind, row, form) {
  if (row.failed) return [element("p", { className: "failed", textContent: row.failed })];
  if (!row.found) return [element("p", { className: "how busy", textContent: "asked …" })];
  const { usage = {} } = row.found;
  const counted = usage.input_tokens === undefined ? usage : { prompt_tokens: usage.input_tokens, completion_tokens: usage.output_tokens };
  return [KINDS[kind].view(row.drawn ?? (row.picture.url ? row.picture : null), row.found, form),
    ...(row.found.notes ?? []).map((note) => element("p", { className: "how", textContent: note })),
    facts({ model: row.found.model, cache: row.cache, total: seconds(row.ms), tokens: tokens(counted) })];
}
