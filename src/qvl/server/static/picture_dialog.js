// One picture, as large as the window.
import { $ } from "./dom.js";
import { addRead } from "./pictures.js";
import { pictureView } from "./picture_view.js";
import { isVideoUrl, strip } from "./video_strip.js";

let opened = null;

export function openPicture(picture) {
  if (!picture.url) return;
  opened = picture;
  $("picture-title").textContent = picture.name + (picture.width ? ` · ${picture.width} × ${picture.height}` : "");
  $("picture-place").replaceChildren(isVideoUrl(picture.url) ? strip(picture) : pictureView(picture).element);
  $("picture-dialog").showModal();
}

export function startPictureDialog() {
  $("picture-again").onclick = () => {
    addRead([opened]);
    $("picture-dialog").close();
  };
  $("picture-dialog").addEventListener("close", () => $("picture-place").replaceChildren());
}
