// A picture with what was located on it: zoom by wheel, keys and buttons, pan by dragging, places that can be pointed at.
import { element, svg } from "./dom.js";
import { posterOf } from "./video_strip.js";

const MOST_ZOOM = 16;
const COLOURS = 6; // classes place-0 … place-5

// `places` are {name, box: {x1, y1, x2, y2}} or {name, point: {x, y}}, in pixels of the picture, or of its `size` [w, h];
// hovered(names) is called as they are pointed at. The result has `element` and mark(names).
export function pictureView(picture, places = [], hovered = () => {}) {
  const image = element("img", { src: posterOf(picture), alt: picture.name, draggable: false });
  const layer = svg("svg", { class: "places", "aria-hidden": "true" });
  const moved = element("div", { className: "moved" }, image, layer);
  const frame = element("div", {
    className: "frame", tabIndex: 0, role: "group", ariaLabel: `${picture.name}: plus and minus zoom, arrows move, 0 shows all of it`,
  }, moved);
  const view = { zoom: 1, x: 0, y: 0 };
  const size = () => picture.size ?? [image.naturalWidth, image.naturalHeight];

  function show() {
    const room = 1 - view.zoom;
    view.x = Math.min(0, Math.max(frame.clientWidth * room, view.x));
    view.y = Math.min(0, Math.max(frame.clientHeight * room, view.y));
    moved.style.transform = `translate(${view.x}px, ${view.y}px) scale(${view.zoom})`;
    frame.classList.toggle("zoomed", view.zoom > 1);
    shown.textContent = `${Math.round(view.zoom * 100)} %`;
  }
  // The point (x, y) of the frame stays where it is.
  function zoom(by, x = frame.clientWidth / 2, y = frame.clientHeight / 2) {
    const next = Math.min(MOST_ZOOM, Math.max(1, view.zoom * by));
    view.x = x - ((x - view.x) * next) / view.zoom;
    view.y = y - ((y - view.y) * next) / view.zoom;
    view.zoom = next;
    show();
  }
  function pan(x, y) {
    view.x += x;
    view.y += y;
    show();
  }
  const whole = () => { Object.assign(view, { zoom: 1, x: 0, y: 0 }); show(); };

  frame.addEventListener("wheel", (event) => {
    // Scrolling the page stays possible: a bare wheel zooms only what has been zoomed or with Ctrl (a pinch).
    if (!event.ctrlKey && view.zoom === 1) return;
    event.preventDefault();
    const at = frame.getBoundingClientRect();
    zoom(Math.exp(-event.deltaY / 300), event.clientX - at.left, event.clientY - at.top);
  }, { passive: false });
  frame.addEventListener("dblclick", (event) => {
    const at = frame.getBoundingClientRect();
    if (view.zoom > 1) whole(); else zoom(3, event.clientX - at.left, event.clientY - at.top);
  });
  frame.addEventListener("keydown", (event) => {
    const step = 40;
    const does = {
      "+": () => zoom(1.5), "=": () => zoom(1.5), "-": () => zoom(1 / 1.5), 0: whole, ArrowLeft: () => pan(step, 0),
      ArrowRight: () => pan(-step, 0), ArrowUp: () => pan(0, step), ArrowDown: () => pan(0, -step),
    }[event.key];
    if (!does || event.ctrlKey || event.metaKey || (event.key.startsWith("Arrow") && view.zoom === 1)) return;
    event.preventDefault();
    does();
  });
  drag(frame, view, pan, zoom);

  const marks = places.map((place, number) => mark(place, number, layer));
  layer.addEventListener("pointermove", (event) => {
    const at = layer.getBoundingClientRect();
    const [wide, high] = size();
    const x = ((event.clientX - at.left) / at.width) * wide;
    const y = ((event.clientY - at.top) / at.height) * high;
    hovered(under(places, x, y, Math.max(wide, high) / 50));
  });
  layer.addEventListener("pointerleave", () => hovered([]));
  image.addEventListener("load", () => {
    layer.setAttribute("viewBox", `0 0 ${size().join(" ")}`);
    const unit = Math.max(...size()) / 100;
    marks.forEach((one) => one.scale(unit));
  });
  const shown = element("span", { className: "how", textContent: "100 %" });
  const press = (text, label, does) => element("button", { type: "button", className: "quiet small", textContent: text, ariaLabel: label, onclick: does });
  const tools = element("div", { className: "tools" }, press("−", "Zoom out", () => zoom(1 / 1.5)), shown,
    press("+", "Zoom in", () => zoom(1.5)), press("All", "Show all of the picture", whole));
  return {
    element: element("div", { className: "viewer" }, frame, tools),
    mark: (names) => marks.forEach((one) => one.on(names)),
  };
}

// One finger or the mouse moves, two fingers zoom.
function drag(frame, view, pan, zoom) {
  const held = new Map();
  const apart = () => {
    const [a, b] = [...held.values()];
    return Math.hypot(a.x - b.x, a.y - b.y);
  };
  frame.addEventListener("pointerdown", (event) => {
    if (event.button !== 0) return;
    held.set(event.pointerId, { x: event.clientX, y: event.clientY });
    if (view.zoom > 1 || held.size > 1) frame.setPointerCapture(event.pointerId);
  });
  frame.addEventListener("pointermove", (event) => {
    const last = held.get(event.pointerId);
    if (!last) return;
    const before = held.size === 2 ? apart() : 0;
    held.set(event.pointerId, { x: event.clientX, y: event.clientY });
    if (held.size === 2 && before) {
      const at = frame.getBoundingClientRect();
      const [a, b] = [...held.values()];
      zoom(apart() / before, (a.x + b.x) / 2 - at.left, (a.y + b.y) / 2 - at.top);
    } else if (view.zoom > 1) pan(event.clientX - last.x, event.clientY - last.y);
  });
  for (const kind of ["pointerup", "pointercancel"]) frame.addEventListener(kind, (event) => held.delete(event.pointerId));
}

// The names of what is at a point: of boxes inside each other the smallest, and those of the same size.
function under(places, x, y, near) {
  const hit = places.filter(({ box, point }) => (box ? box.x1 <= x && x <= box.x2 && box.y1 <= y && y <= box.y2
    : Math.hypot(point.x - x, point.y - y) <= near));
  const size = ({ box }) => (box ? (box.x2 - box.x1) * (box.y2 - box.y1) : 0);
  const least = Math.min(...hit.map(size));
  return hit.filter((place) => size(place) <= least * 1.05).map(({ name }) => name);
}

function mark(place, number, layer) {
  const { box, point, name } = place;
  const shape = box ? svg("rect", { x: box.x1, y: box.y1, width: Math.max(0, box.x2 - box.x1), height: Math.max(0, box.y2 - box.y1) })
    : svg("circle", { cx: point.x, cy: point.y, r: 1 });
  const title = svg("title");
  title.textContent = name;
  const text = svg("text", {});
  text.textContent = name;
  const made = svg("g", { class: `place place-${number % COLOURS}` }, title, shape, text);
  layer.append(made);
  return {
    // Sizes follow the picture's, so that marks look the same on small and large ones.
    scale: (unit) => {
      if (!box) shape.setAttribute("r", unit * 1.4);
      text.setAttribute("x", box ? box.x1 : point.x + unit * 2);
      text.setAttribute("y", Math.max(unit * 5, (box ? box.y1 : point.y) - unit * 0.6));
      text.setAttribute("font-size", unit * 5);
      text.setAttribute("stroke-width", unit * 0.8);
    },
    on: (wanted) => made.classList.toggle("on", wanted.includes(name)),
  };
}
