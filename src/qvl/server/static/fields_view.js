// What was found on one picture: fields with their confidences, the picture with the places, joined by pointing at either.
import { element } from "./dom.js";
import { isDocumentUrl } from "./document_sheet.js";
import { pictureView } from "./picture_view.js";
import { isVideoUrl, strip } from "./video_strip.js";

const isBox = (value) => value && typeof value === "object" && ["x1", "y1", "x2", "y2"].every((name) => Number.isFinite(value[name]));
const isPoint = (value) => value && typeof value === "object" && !isBox(value) && Number.isFinite(value.x) && Number.isFinite(value.y);

// Every value with its path, as field_confidence names it; a box or a point is one value.
export function leaves(value, path = "") {
  if (value === null || typeof value !== "object" || isBox(value) || isPoint(value)) return [[path, value]];
  if (Array.isArray(value)) {
    if (value.every((inner) => inner === null || typeof inner !== "object")) return [[path, value]];
    return value.flatMap((inner, index) => leaves(inner, `${path}[${index}]`));
  }
  return Object.entries(value).flatMap(([name, inner]) => leaves(inner, path ? `${path}.${name}` : name));
}

export function shownValue(value) {
  if (value === null || value === undefined) return "—";
  if (isBox(value)) return [value.x1, value.y1, value.x2, value.y2].map(Math.round).join(", ");
  if (isPoint(value)) return [value.x, value.y].map(Math.round).join(", ");
  if (Array.isArray(value)) return value.join(", ");
  return typeof value === "boolean" ? (value ? "yes" : "no") : String(value);
}

export const percent = (share) => (share > 0 && share < 0.01 ? "< 1 %" : `${Math.round(share * 100)} %`);

// A bar with its figure. `calibrated` says that so many of such answers are right; else it is the model's own.
export function bar(share, name, calibrated = false) {
  return element("span", { className: "sure" },
    element("meter", { min: 0, max: 1, low: 0.5, high: 0.8, optimum: 1, value: share, ariaLabel: `confidence of ${name}` }),
    element("span", { className: "figure", textContent: percent(share) }),
    calibrated ? element("span", { className: "badge", textContent: "calibrated", title: "So many of such answers are right." }) : null);
}

const WHY = { below_threshold: "it would too often be wrong", not_calibrated: "nobody has measured how often it is right" };
// Why something is not told, in words.
export const why = (reason) => WHY[reason] ?? reason;

// Rows {path, value, sure, raw, untold, page}: one of each field, also of those that were too unsure to be told.
export function fieldRows(found) {
  const untold = found.abstained ?? {};
  const rows = leaves(found.analysis).filter(([path]) => path).map(([path, value]) => ({
    path, value, sure: found.field_confidence?.[path], raw: found.raw_field_confidence?.[path], untold: untold[path],
    page: found.pages?.[path] ?? found.pages?.[path.split(/[.[]/)[0]],
  }));
  for (const [path, reason] of Object.entries(untold)) {
    if (rows.some((row) => row.path === path)) continue;
    rows.push({ path, value: null, untold: reason, sure: found.field_confidence?.[path], raw: found.raw_field_confidence?.[path] });
  }
  return rows;
}

// The places on the first picture, which is the one that is shown.
export function placesOf(found) {
  const told = Object.entries(found.evidence ?? {}).filter(([, place]) => place)
    .map(([name, { box, point }]) => ({ name, box, point }));
  const own = leaves(found.analysis).filter(([, value]) => isBox(value) || isPoint(value))
    .map(([name, value]) => (isBox(value) ? { name, box: value } : { name, point: value }));
  return [...told, ...own].filter(isFirst);
}

const isFirst = ({ box, point }) => !(box ?? point).picture;

// A bar with the model's own confidence beside a calibrated one.
export function barOf(name, sure, raw, calibrated) {
  const made = bar(sure, name, calibrated);
  if (calibrated && Number.isFinite(raw)) made.append(element("span", { className: "how", textContent: `the model's own: ${percent(raw)}` }));
  return made;
}

function fieldLine(row, calibrated) {
  const line = element("div", { className: "field", data: { path: row.path } },
    element("span", { className: "name", textContent: row.path }),
    row.untold ? element("span", { className: "untold" }, element("strong", { textContent: "cannot tell" }), ` (${why(row.untold)})`)
      : element("span", { className: "value" }, shownValue(row.value),
        row.page ? element("span", { className: "how", textContent: ` page ${row.page}` }) : null));
  if (Number.isFinite(row.sure)) {
    line.append(barOf(row.path, row.sure, row.raw, calibrated));
  }
  return line;
}

// The picture with its places, a video as its frames; nothing of a document whose page is not here.
function seen(picture, places, mark) {
  if (!picture?.url || isDocumentUrl(picture.url)) return null;
  return isVideoUrl(picture.url) ? { element: element("div", { className: "viewer" }, strip(picture)), mark: () => {} }
    : pictureView(picture, places, mark);
}

// Joins lines and places: pointing at one marks the other. A line belongs to the place of its name, or of its first part.
export function joined(picture, places, lines) {
  const placeOf = (path) => places.find(({ name }) => name === path) ?? places.find(({ name }) => path.startsWith(`${name}.`));
  const mark = (names) => {
    view?.mark(names);
    for (const line of lines) line.classList.toggle("on", names.includes(placeOf(line.dataset.path)?.name));
  };
  const view = seen(picture, places, mark);
  for (const line of lines) {
    const place = placeOf(line.dataset.path);
    if (!place) continue;
    line.classList.add("placed");
    line.tabIndex = 0;
    line.addEventListener("pointerenter", () => mark([place.name]));
    line.addEventListener("pointerleave", () => mark([]));
    line.addEventListener("focus", () => mark([place.name]));
    line.addEventListener("blur", () => mark([]));
  }
  return element("div", { className: "joined" }, view?.element, element("div", { className: "lines" }, ...lines));
}

export function analysisView(picture, found) {
  const calibrated = found.confidence_method === "calibrated";
  const lines = fieldRows(found).map((row) => fieldLine(row, calibrated));
  if (Number.isFinite(found.confidence)) {
    lines.push(element("div", { className: "field whole", data: { path: "" } },
      element("span", { className: "name", textContent: "all together" }), bar(found.confidence, "all together", calibrated)));
  }
  const others = Object.values(found.evidence ?? {}).some((place) => place && !isFirst(place));
  const made = joined(picture, placesOf(found), lines);
  if (others) made.append(how("Drawn are the boxes of the first page shown; name one page beside the document to see its own."));
  return made;
}

const how = (text) => element("p", { className: "how wide", textContent: text });
const isCalibrated = ({ confidence_method: method }) => method === "calibrated";

export function locatedView(picture, found) {
  const seen = new Map();
  const items = found.located.map((item) => {
    const number = (seen.get(item.label) ?? 0) + 1;
    seen.set(item.label, number);
    return { ...item, name: number > 1 ? `${item.label} ${number}` : item.label };
  });
  const lines = items.map((item) => {
    const line = element("div", { className: "field", data: { path: item.name } },
      element("span", { className: "name", textContent: item.name }),
      element("span", { className: "value", textContent: shownValue(item.box ?? item.point) }));
    if (Number.isFinite(item.confidence)) line.append(barOf(item.name, item.confidence, item.raw_confidence, isCalibrated(item)));
    return line;
  });
  const raw = items.some((item) => Number.isFinite(item.confidence) && !isCalibrated(item));
  if (!lines.length) lines.push(element("p", { textContent: "nothing located", data: { path: "" } }));
  const made = joined(picture, items, lines);
  if (raw) made.append(how("A bar is how likely these very numbers were; a box that lies right may have a low one. A calibration tells more."));
  return made;
}
