// Tables as CSV (RFC 4180), written and read.

// A text that a spreadsheet would run as a formula begins with an apostrophe; numbers stay as they are.
function cell(value) {
  if (value === null || value === undefined) return "";
  let text = typeof value === "object" ? JSON.stringify(value) : String(value);
  if (typeof value === "string" && /^[=+\-@\t\r]/.test(text) && !Number.isFinite(Number(text))) text = `'${text}`;
  return /[",\n\r]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
}

export const toCsv = (head, rows) => [head, ...rows].map((row) => row.map(cell).join(",")).join("\r\n").concat("\r\n");

// Rows of texts. The separator is the one of comma, semicolon and tab that the first line has most of.
export function fromCsv(text) {
  const source = text.replace(/^\ufeff/, "");
  const first = source.slice(0, source.search(/[\r\n]|$/));
  const separator = [",", ";", "\t"].reduce((a, b) => (first.split(b).length > first.split(a).length ? b : a));
  const rows = [];
  let row = [];
  let at = 0;
  while (at < source.length) {
    let value = "";
    if (source[at] === '"') {
      at += 1;
      for (;;) {
        const end = source.indexOf('"', at);
        if (end < 0) throw new Error(`line ${rows.length + 1}: a quoted value does not end`);
        value += source.slice(at, end);
        at = end + 1;
        if (source[at] !== '"') break;
        value += '"';
        at += 1;
      }
    }
    while (at < source.length && source[at] !== separator && source[at] !== "\n" && source[at] !== "\r") {
      value += source[at];
      at += 1;
    }
    row.push(value);
    if (source[at] === separator) {
      at += 1;
      if (at < source.length) continue;
      row.push("");
    }
    if (source[at] === "\r") at += 1;
    if (source[at] === "\n") at += 1;
    rows.push(row);
    row = [];
  }
  return rows.filter((one) => one.some((value) => value.trim()));
}
