// PDF documents of the page: known by their data URL, shown as a sheet, their pages chosen beside it. The choice is part
// of the URL (`#page=1-3`), so that every request and what the history keeps have it.
import { element } from "./dom.js";

const PAGES = /#page=(.*)$/;
const drawing = '<svg xmlns="http://www.w3.org/2000/svg" width="120" height="150" viewBox="0 0 120 150">'
  + '<path d="M10 5h70l30 30v110H10z" fill="#fff" stroke="#777" stroke-width="3"/>'
  + '<path d="M80 5v30h30" fill="none" stroke="#777" stroke-width="3"/>'
  + '<text x="60" y="100" font-family="sans-serif" font-size="30" font-weight="bold" text-anchor="middle" fill="#b32">PDF</text></svg>';

// A picture that stands for a document.
export const SHEET = `data:image/svg+xml,${encodeURIComponent(drawing)}`;

export const isDocument = (file) => file.type === "application/pdf" || /\.pdf$/i.test(file.name);

export const isDocumentUrl = (url) => /^data:application\/pdf/.test(url ?? "");

export const asDocument = (url) => url.replace(/^data:[^;,]*/, "data:application/pdf");

const pagesOf = (url) => PAGES.exec(url.slice(-200))?.[1] ?? "";

// The page that an answer's overlay has in it, as a picture; taken out of the answer, which is shown and kept without.
export function pageOf(name, found) {
  const { overlay } = found;
  delete found.overlay;
  if (!overlay) return undefined;
  const drawn = new TextDecoder().decode(Uint8Array.from(atob(overlay.split(",")[1]), (letter) => letter.charCodeAt(0)));
  const shown = new DOMParser().parseFromString(drawn, "image/svg+xml").querySelector("image");
  return { name, url: shown.getAttribute("href"), size: [Number(shown.getAttribute("width")), Number(shown.getAttribute("height"))] };
}

// A field for the pages that are shown, for the list of pictures; null for what is no document.
export function pagesField(picture) {
  if (!isDocumentUrl(picture.url)) return null;
  const field = element("input", {
    type: "text", className: "pages", value: pagesOf(picture.url), placeholder: "all, or 1-3,7",
    ariaLabel: `Pages of ${picture.name}`,
  });
  field.onchange = () => {
    const bare = picture.url.slice(0, picture.url.length - pagesOf(picture.url).length).replace(/#page=$/, "");
    picture.url = field.value.trim() ? `${bare}#page=${field.value.trim()}` : bare;
  };
  return field;
}
