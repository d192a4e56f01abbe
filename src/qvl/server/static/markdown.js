// A model's Markdown as elements. Every character of it is set as text; of links, http, https and mailto alone are live.
import { copyButton, element } from "./dom.js";

const MOST_LEVELS = 12; // of quotes and lists inside each other
const FENCE = /^ {0,3}(`{3,}|~{3,})\s*([^`\s]*)[^`]*$/;
const HEADING = /^ {0,3}(#{1,6})\s+(.*?)\s*#*\s*$/;
const RULE = /^ {0,3}([-*_])[ \t]*(?:\1[ \t]*){2,}$/;
const ITEM = /^( *)([-*+]|\d{1,9}[.)])(?:\s+(.*))?$/;
const QUOTE = /^ {0,3}> ?/;
const TABLE_RULE = /^ {0,3}\|?\s*:?-+:?\s*(\|\s*:?-+:?\s*)*\|?\s*$/;

export function markdown(text) {
  const made = document.createDocumentFragment();
  blocks(text.replaceAll("\r\n", "\n").split("\n"), made, 0);
  return made;
}

function blocks(lines, into, level) {
  let at = 0;
  while (at < lines.length) {
    const line = lines[at];
    const starts = [fence, heading, rule, quote, list, table];
    const next = !line.trim() ? at + 1
      : starts.reduce((found, start) => found ?? (level < MOST_LEVELS ? start(lines, at, into, level) : null), null);
    at = next ?? paragraph(lines, at, into, level);
  }
}

function fence(lines, at, into) {
  const open = FENCE.exec(lines[at]);
  if (!open) return null;
  let end = at + 1;
  const closes = (line) => line.trim().startsWith(open[1]) && !line.trim().replaceAll(open[1][0], "");
  while (end < lines.length && !closes(lines[end])) end += 1;
  const code = lines.slice(at + 1, end).join("\n");
  into.append(element("div", { className: "code-block" },
    element("div", { className: "code-head" }, element("span", { textContent: open[2] || "code" }), copyButton("Copy", () => code)),
    element("pre", { tabIndex: 0 }, element("code", { textContent: code }))));
  return end + 1;
}

function heading(lines, at, into) {
  const found = HEADING.exec(lines[at]);
  if (!found) return null;
  // The page's own headings are h1 and h2.
  into.append(inline(found[2], element(`h${Math.min(6, found[1].length + 2)}`)));
  return at + 1;
}

function rule(lines, at, into) {
  if (!RULE.test(lines[at])) return null;
  into.append(element("hr"));
  return at + 1;
}

function quote(lines, at, into, level) {
  if (!QUOTE.test(lines[at])) return null;
  let end = at;
  while (end < lines.length && lines[end].trim() && (QUOTE.test(lines[end]) || end > at)) end += 1;
  const made = element("blockquote");
  blocks(lines.slice(at, end).map((line) => line.replace(QUOTE, "")), made, level + 1);
  into.append(made);
  return end;
}

function list(lines, at, into, level) {
  const first = ITEM.exec(lines[at]);
  if (!first) return null;
  const ordered = /\d/.test(first[2]);
  const made = element(ordered ? "ol" : "ul");
  if (ordered) made.start = parseInt(first[2], 10);
  const base = first[1].length;
  while (at < lines.length) {
    const item = ITEM.exec(lines[at]);
    if (!item || item[1].length > base + 1 || item[1].length < base || /\d/.test(item[2]) !== ordered) break;
    const inner = [item[3] ?? ""];
    const indent = base + item[2].length + 1;
    at += 1;
    while (at < lines.length) {
      const line = lines[at];
      const depth = line.search(/\S/);
      if (depth < 0) {
        const following = lines[at + 1] ?? "";
        if (following.search(/\S/) <= base && !ITEM.test(following)) break;
      } else if (depth <= base && (ITEM.test(line) || !lines[at - 1].trim() || startsBlock(line))) break;
      inner.push(depth < 0 ? "" : line.slice(Math.min(depth, indent)));
      at += 1;
    }
    const entry = element("li");
    while (inner.length > 1 && !inner.at(-1)) inner.pop();
    blocks(inner, entry, level + 1);
    // One paragraph alone needs no space around it.
    if (entry.firstElementChild?.tagName === "P") entry.firstElementChild.replaceWith(...entry.firstElementChild.childNodes);
    made.append(entry);
  }
  into.append(made);
  return at;
}

const startsBlock = (line) => FENCE.test(line) || HEADING.test(line) || QUOTE.test(line) || RULE.test(line);

function cells(line) {
  const found = [];
  let cell = "";
  const inner = line.trim().replace(/^\|/, "");
  for (let at = 0; at < inner.length; at += 1) {
    if (inner[at] === "\\" && inner[at + 1] === "|") { cell += "|"; at += 1; } else if (inner[at] === "|") { found.push(cell.trim()); cell = ""; } else cell += inner[at];
  }
  if (cell.trim()) found.push(cell.trim());
  return found;
}

function table(lines, at, into) {
  if (!lines[at].includes("|") || !TABLE_RULE.test(lines[at + 1] ?? "") || !(lines[at + 1] ?? "").includes("-")) return null;
  const head = cells(lines[at]);
  const aligned = cells(lines[at + 1]).map((cell) =>
    (cell.endsWith(":") ? (cell.startsWith(":") ? "center" : "right") : "left"));
  if (aligned.length !== head.length) return null;
  let end = at + 2;
  while (end < lines.length && lines[end].trim() && lines[end].includes("|")) end += 1;
  const rows = lines.slice(at + 2, end).map(cells);
  const row = (tag, texts) => element("tr", {}, ...head.map((_, index) =>
    inline(texts[index] ?? "", element(tag, { className: aligned[index] }))));
  const tabbed = () => [head, ...rows].map((texts) => texts.join("\t")).join("\n");
  into.append(element("div", { className: "table-block" }, copyButton("Copy table", tabbed),
    element("div", { className: "scroll", tabIndex: 0 }, element("table", {}, element("thead", {}, row("th", head)),
      element("tbody", {}, ...rows.map((texts) => row("td", texts)))))));
  return end;
}

function paragraph(lines, at, into, level) {
  let end = at + 1;
  const goesOn = (line) => line.trim() && !startsBlock(line) && !ITEM.test(line);
  while (end < lines.length && (level >= MOST_LEVELS || goesOn(lines[end]))) end += 1;
  const made = element("p");
  lines.slice(at, end).forEach((line, index) => {
    if (index) made.append(element("br"));
    inline(line.trim(), made);
  });
  into.append(made);
  return end;
}

// One pass over the text: each rule is tried where it could begin, and looks ahead no farther than this block.
const INLINE = [
  [/(`{1,10})(.{1,5000}?)\1(?!`)/y, (found) => element("code", { textContent: found[2].trim() || found[2] })],
  [/\*\*(?=\S)(.{1,2000}?\S|\S)\*\*/y, (found) => inline(found[1], element("strong"))],
  [/__(?=\S)(.{1,2000}?\S|\S)__(?!\w)/y, (found) => inline(found[1], element("strong"))],
  [/\*(?=[^\s*])([^*]{1,2000}?[^\s*]|[^\s*])\*/y, (found) => inline(found[1], element("em"))],
  [/_(?=[^\s_])([^_]{1,2000}?[^\s_]|[^\s_])_(?!\w)/y, (found) => inline(found[1], element("em"))],
  [/~~(?=\S)(.{1,2000}?\S|\S)~~/y, (found) => inline(found[1], element("del"))],
  // A picture of elsewhere would be fetched from elsewhere: it becomes a link.
  [/!?\[([^\]]{0,1000})\]\(\s*<?([^\s()<>]{1,2000})>?(?:\s+"[^"]{0,500}")?\s*\)/y, (found) => link(found[1] || found[2], found[2], found[0])],
  [/<?(https?:\/\/[^\s<>"'`]{1,2000}[^\s<>"'`.,;:!?)\]])>?/y, (found) => link(found[1], found[1], found[0])],
];
const MARKS = new Set("\\`*_~![<h");

function inline(text, into) {
  let plain = "";
  let at = 0;
  const flush = () => { if (plain) into.append(plain); plain = ""; };
  while (at < text.length) {
    if (text[at] === "\\" && /[\\`*_~[\](){}#+.!|<>-]/.test(text[at + 1] ?? "")) {
      plain += text[at + 1];
      at += 2;
      continue;
    }
    const within = text[at] === "_" && /\w/.test(text[at - 1] ?? "");
    const hit = MARKS.has(text[at]) && !within ? matched(text, at) : null;
    if (hit) {
      flush();
      into.append(hit.made);
      at += hit.length;
    } else {
      plain += text[at];
      at += 1;
    }
  }
  flush();
  return into;
}

function matched(text, at) {
  for (const [pattern, make] of INLINE) {
    pattern.lastIndex = at;
    const found = pattern.exec(text);
    if (found) return { made: make(found), length: found[0].length };
  }
  return null;
}

function link(text, target, whole) {
  let url = null;
  try {
    url = new URL(target);
  } catch { /* a path: there is nothing on this server that it could mean */ }
  if (!url || !["http:", "https:", "mailto:"].includes(url.protocol)) return document.createTextNode(whole);
  return element("a", { href: url.href, target: "_blank", rel: "noopener noreferrer", textContent: text });
}
