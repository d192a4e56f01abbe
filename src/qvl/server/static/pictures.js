// The pictures and videos that will be sent: added by drop, paste, chooser or sample, read, shown, taken.
import { asDocument, isDocument, isDocumentUrl, pagesField } from "./document_sheet.js";
import { $, element, fail } from "./dom.js";
import { pictureTokens } from "./picture_tokens.js";
import { asVideo, isVideo, isVideoUrl, posterOf, readFrames, strip } from "./video_strip.js";

// One list for the next turn of the conversation, one for the tabs that look at each picture by itself.
// A picture is {name, url, width, height, reading}: `url` a data URL, null until the file has been read.
const lists = { chat: [], work: [] };
let shown = "chat";
let lastAsked = [];

export const current = () => lists[shown];

function readFile(file) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(reader.error);
    reader.readAsDataURL(file);
  });
}

// The size that a browser shows, which has EXIF's orientation in it; none for what a browser cannot show.
export async function measure(picture) {
  if (isVideoUrl(picture.url)) return picture.frames ? undefined : readFrames(picture);
  if (isDocumentUrl(picture.url)) return undefined;
  const image = new Image();
  image.src = picture.url;
  try {
    await image.decode();
    picture.width = image.naturalWidth;
    picture.height = image.naturalHeight;
  } catch { /* the server may still know the form */ }
}

// The data URL of a file as what it is: a browser has no media type for some.
export const typed = (file, url) => (isVideo(file) ? asVideo(url) : isDocument(file) ? asDocument(url) : url);

export function pictureOf(file, changed = () => {}) {
  const picture = { name: file.name || "pasted", url: null };
  // Never rejects: who waits for several reads wants them all, whichever fails.
  picture.reading = readFile(file).then(async (url) => {
    picture.url = typed(file, url);
    changed(picture);
    await measure(picture);
    changed(picture);
  }, (error) => {
    picture.failed = error;
    changed(picture);
  });
  return picture;
}

const isPicture = (file) => file.type.startsWith("image/") || /\.(avif|bmp|gif|hei[cf]|jpe?g|jxl|png|tiff?|webp)$/i.test(file.name);

export const isMedia = (file) => isPicture(file) || isVideo(file) || isDocument(file);

export function add(files) {
  const list = current();
  const images = [...files].filter(isMedia);
  const others = [...files].filter((file) => !images.includes(file)).map((file) => file.name || "pasted");
  for (const file of images) {
    list.push(pictureOf(file, (picture) => {
      if (picture.failed) {
        remove(picture);
        fail(`${picture.name} cannot be read: ${picture.failed.message}`);
      }
      show();
    }));
  }
  show();
  if (others.length) fail(`Not a picture, video or PDF: ${others.join(", ")}`);
}

export function addRead(pictures) {
  current().push(...pictures.map((picture) => (picture.reading ? picture : { ...picture, reading: Promise.resolve() })));
  show();
}

// The list of this tab is these pictures, which have been read.
export function replaceAll(pictures) {
  current().length = 0;
  addRead(pictures);
}

export function remove(picture) {
  for (const list of Object.values(lists)) {
    const index = list.indexOf(picture);
    if (index >= 0) list.splice(index, 1);
  }
  show();
}

// Pictures as they stand when a request is sent, once all of them have been read.
export async function whenRead(pictures, signal) {
  const stopped = new Promise((_, reject) => { signal?.addEventListener("abort", () => reject(signal.reason), { once: true }); });
  stopped.catch(() => {});
  await Promise.race([stopped, Promise.all(pictures.map((picture) => picture.reading))]);
  signal?.throwIfAborted();
  const failed = pictures.find((picture) => picture.failed);
  if (failed) throw new Error(`${failed.name} cannot be read: ${failed.failed.message}`);
  return pictures;
}

// Takes the pictures of the next turn out of the list.
export function takeForTurn() {
  lastAsked = lists.chat.splice(0);
  show();
  return lastAsked;
}

export function setLastAsked(pictures) {
  lastAsked = pictures;
}

// Shows the list of a tab. An empty one begins with the pictures that the other was about.
export function choose(name) {
  if (name === shown) return;
  const from = lists[shown];
  shown = name;
  if (!lists[name].length && name === "work") lists.work.push(...(from.length ? from : lastAsked));
  if (!lists[name].length && name === "chat" && !lastAsked.length) lists.chat.push(...from);
  show();
}

function thumbnail(picture) {
  if (!picture.url) return element("span", { className: "reading", textContent: `reading ${picture.name} …` });
  return isVideoUrl(picture.url) ? strip(picture) : element("img", { src: posterOf(picture), alt: picture.name });
}

export function show() {
  $("pictures").replaceChildren(...current().map((picture) => {
    const away = element("button", { type: "button", className: "away", textContent: "×", ariaLabel: `Remove ${picture.name}` });
    away.onclick = (event) => {
      event.stopPropagation();
      remove(picture);
      $("choose").focus();
    };
    const size = picture.width ? `${picture.width} × ${picture.height}` : "";
    const count = element("span", { className: "count" });
    if (picture.seconds) count.textContent = `${picture.seconds.toFixed(1)} s`;
    else if (picture.width) pictureTokens(picture).then((told) => { count.textContent = told; });
    return element("li", {}, thumbnail(picture), element("div", { className: "about" },
      element("span", { className: "name", textContent: picture.name, title: picture.name }), away),
    element("div", { className: "about" }, element("span", { textContent: size }), count), pagesField(picture));
  }));
}
