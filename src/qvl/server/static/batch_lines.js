// What a batch is made of: lines from a folder of pictures, videos and PDFs, or from a CSV file with their names or URLs.
import { fromCsv } from "./csv.js";
import { isMedia } from "./pictures.js";

const PICTURE = /^(image|image_url|picture|photo|video|document|pdf|file|filename|path|url)$/i;
const QUESTION = /^(question|prompt|text)$/i;

// Every file of what was dropped, folders walked through.
export async function filesOf(transfer) {
  const entries = [...transfer.items].map((item) => item.webkitGetAsEntry?.()).filter(Boolean);
  if (!entries.length) return [...transfer.files];
  const found = [];
  const walk = async (entry) => {
    if (entry.isFile) {
      const file = await new Promise((resolve, reject) => { entry.file(resolve, reject); });
      found.push(Object.assign(file, { inside: entry.fullPath.slice(1) }));
      return;
    }
    const reader = entry.createReader();
    for (;;) {
      // A browser tells a hundred at a time.
      const some = await new Promise((resolve, reject) => { reader.readEntries(resolve, reject); });
      if (!some.length) return;
      for (const one of some) await walk(one);
    }
  };
  for (const entry of entries) await walk(entry);
  return found;
}

const nameOf = (file) => file.inside || file.webkitRelativePath || file.name;

// {lines: [{name, image, pages, question, own}], notes}: `image` is a Blob or a URL, `pages` of a PDF's name ("a.pdf#page=2"),
// `own` the row of the CSV file.
export async function linesOf(files) {
  const table = files.find((file) => /\.(csv|tsv)$/i.test(file.name));
  const pictures = files.filter(isMedia).sort((a, b) => nameOf(a).localeCompare(nameOf(b), undefined, { numeric: true }));
  if (!table) {
    const left = files.length - pictures.length;
    if (!pictures.length) throw new Error("There is no picture, video or PDF in it, and no CSV file.");
    return {
      lines: pictures.map((file) => ({ name: nameOf(file), image: file, pages: null, question: null, own: null })),
      notes: left ? [`Left out: ${left} ${left === 1 ? "file that is" : "files that are"} no picture, video or PDF.`] : [],
    };
  }
  return fromTable(table.name, fromCsv(await table.text()), pictures);
}

function fromTable(name, rows, pictures) {
  const [head, ...body] = rows;
  const column = head?.findIndex((title) => PICTURE.test(title.trim())) ?? -1;
  if (column < 0) throw new Error(`${name} has no column of pictures: call it image, video, document, file or url.`);
  if (!body.length) throw new Error(`${name} has no line below its head.`);
  const asked = head.findIndex((title) => QUESTION.test(title.trim()));
  const missing = [];
  const lines = body.map((row, index) => {
    const given = (row[column] ?? "").trim();
    const there = /^(https?:|data:)/.test(given);
    const [bare, pages = null] = there ? [given] : given.split("#page=");
    const last = bare.split(/[\\/]/).pop();
    const file = there ? null : pictures.find((one) => nameOf(one) === bare)
      ?? pictures.find((one) => one.name === last || nameOf(one).endsWith(`/${last}`));
    if (!file && !there) missing.push(`line ${index + 2}: ${given || "no picture"}`);
    return {
      name: there ? given.slice(0, 200) : given, image: file ?? given, pages, question: asked < 0 ? null : (row[asked] ?? "").trim() || null,
      own: Object.fromEntries(head.map((title, at) => [title.trim() || `column ${at + 1}`, row[at] ?? ""])),
    };
  });
  if (missing.length) {
    const more = missing.length > 3 ? ` and ${missing.length - 3} more` : "";
    throw new Error(`${name} names files that are not here: ${missing.slice(0, 3).join("; ")}${more}. Choose or drop the CSV file and its files together.`);
  }
  return { lines, notes: [] };
}
