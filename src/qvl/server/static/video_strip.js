// Videos of the page: known by their data URL, shown as a strip of frames with their times where the browser plays them.
import { SHEET, isDocumentUrl } from "./document_sheet.js";
import { element } from "./dom.js";

const FRAMES = 8;
const EDGE = 128;
const PATIENCE = 10000;

const ENDING = /\.(mp4|m4v|mov|3gp|mkv|webm|avi|m?ts|m2ts|mpe?g|flv|ogv|wmv)$/i;

export const isVideo = (file) => file.type.startsWith("video/") || ENDING.test(file.name);

// A browser has no media type for some containers.
export const asVideo = (url) => url.replace(/^data:(?!video\/)[^;,]*/, "data:video/mp4");

export const isVideoUrl = (url) => /^data:video\//.test(url ?? "");

// The part of a message that shows what has this URL; one of elsewhere is known by its ending.
export const partOf = (url) => (isVideoUrl(url) || (/^https?:/.test(url) && ENDING.test(url.split(/[?#]/)[0]))
  ? { type: "video_url", video_url: { url } } : { type: "image_url", image_url: { url } });

// A picture to draw where one is all that fits.
export const posterOf = (shown) => shown.frames?.[0]?.src ?? (isDocumentUrl(shown.url) ? SHEET : shown.url);

const happened = (video, name) => new Promise((resolve, reject) => {
  const timer = setTimeout(reject, PATIENCE);
  video.addEventListener(name, () => { clearTimeout(timer); resolve(); }, { once: true });
  video.addEventListener("error", () => { clearTimeout(timer); reject(); }, { once: true });
});

// Behind "seeked" the old frame may still be the one that is drawn. Where the new one is the same no callback comes.
const painted = (video) => new Promise((resolve) => {
  if (!video.requestVideoFrameCallback) return resolve();
  const timer = setTimeout(resolve, 500);
  return video.requestVideoFrameCallback(() => { clearTimeout(timer); resolve(); });
});

// Sets the `frames` of a video, [{at, src}] evenly spread, with `width`, `height` and `seconds`; none that cannot be played.
export async function readFrames(shown) {
  const video = element("video", { muted: true, preload: "auto" });
  const frames = [];
  try {
    const loaded = happened(video, "loadeddata");
    video.src = shown.url;
    await loaded;
    if (!Number.isFinite(video.duration)) throw new Error("its length is not known");
    const scale = EDGE / Math.max(video.videoWidth, video.videoHeight);
    const canvas = element("canvas", {
      width: Math.max(1, Math.round(video.videoWidth * scale)), height: Math.max(1, Math.round(video.videoHeight * scale)),
    });
    for (let number = 0; number < FRAMES; number++) {
      const at = (video.duration * number) / FRAMES;
      const there = [happened(video, "seeked"), ...(number ? [painted(video)] : [])];
      video.currentTime = at;
      await Promise.all(there);
      canvas.getContext("2d").drawImage(video, 0, 0, canvas.width, canvas.height);
      frames.push({ at, src: canvas.toDataURL("image/webp", 0.8) });
    }
    Object.assign(shown, { frames, width: video.videoWidth, height: video.videoHeight, seconds: video.duration });
  } catch { /* the server may still know the form */
    shown.frames = [];
  } finally {
    video.removeAttribute("src");
  }
}

// Frames that do not fit are scrolled to, by keyboard too; `within` a button they stand in several lines.
export function strip(shown, within = false) {
  if (!shown.frames?.length) {
    const told = shown.frames ? "the browser does not play it" : "reading its frames …";
    return element("span", { className: "reading", textContent: `${shown.name}: ${told}` });
  }
  const figures = shown.frames.map(({ at, src }) => element("span", { className: "frame-at" },
    element("img", { src, alt: "" }), element("span", { className: "how", textContent: `${at.toFixed(1)} s` })));
  const told = `${figures.length} frames of ${shown.name}, ${shown.seconds.toFixed(1)} s`;
  return element("span", { className: "frames", ...(!within && { tabIndex: 0 }), attributes: { role: "img", "aria-label": told } }, ...figures);
}
