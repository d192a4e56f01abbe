// The turns of a conversation as elements.
import { button, copyButton, element, facts, seconds, tokens } from "./dom.js";
import { markdown } from "./markdown.js";
import { isVideoUrl, posterOf, strip } from "./video_strip.js";

const seen = (picture, within) => (isVideoUrl(picture.url) ? strip(picture, within) : element("img", { src: posterOf(picture), alt: picture.name }));

export function pictureRow(pictures, open) {
  if (!pictures.length) return null;
  return element("ul", { className: "turn-pictures", ariaLabel: "Pictures of this turn" }, ...pictures.map((picture) => {
    const shown = picture.url ? seen(picture, true)
      : element("span", { className: "reading", textContent: `reading ${picture.name} …` });
    return element("li", {}, element("button", {
      type: "button", className: "picture", title: `${picture.name}: look closer`, onclick: () => open(picture),
    }, shown));
  }));
}

// A turn of the person: its pictures and text; `does` has edit(), open(picture).
export function userTurn(turn, does, busy) {
  const actions = busy ? null : element("div", { className: "actions" }, button("Edit", does.edit));
  return element("li", { className: "turn user" }, element("h2", { className: "who", textContent: "You" }),
    pictureRow(turn.pictures, does.open), element("p", { className: "said", textContent: turn.text }), actions);
}

// The same turn as it is being changed; `does` has open(picture), send(text, pictures) and cancel().
export function editedTurn(turn, does) {
  let pictures = [...turn.pictures];
  const text = element("textarea", { rows: 3, value: turn.text, ariaLabel: "Changed question" });
  const held = element("ul", { className: "turn-pictures" });
  const show = () => held.replaceChildren(...pictures.map((picture) => {
    const away = element("button", { type: "button", className: "away", textContent: "×", ariaLabel: `Remove ${picture.name}` });
    away.onclick = () => { pictures = pictures.filter((other) => other !== picture); show(); };
    return element("li", {}, seen(picture), away);
  }));
  show();
  const send = () => does.send(text.value.trim() || turn.text, pictures);
  text.onkeydown = (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) send();
    if (event.key === "Escape") does.cancel();
  };
  return element("li", { className: "turn user edited" }, element("h2", { className: "who", textContent: "You" }), held, text,
    element("p", { className: "how", textContent: "What follows this turn is asked anew." }),
    element("div", { className: "row" }, button("Cancel", does.cancel),
      element("button", { type: "button", textContent: "Send", onclick: send })));
}

// A turn of the model: show(turn) draws it again as it grows, at most once a frame. `does` has regenerate() and code().
export class AnswerTurn {
  constructor(does) {
    this.does = does;
    this.reasoning = element("pre", { className: "reasoning", tabIndex: 0 });
    this.summary = element("summary", { textContent: "Reasoning" });
    this.folded = element("details", { className: "thought", hidden: true }, this.summary, this.reasoning);
    this.text = element("div", { className: "answer" });
    this.below = element("div");
    this.element = element("li", { className: "turn assistant" }, element("h2", { className: "who", textContent: "Answer" }),
      this.folded, this.text, this.below);
    this.waiting = null;
  }

  busy(turn) {
    this.text.classList.add("busy");
    this.waiting ??= requestAnimationFrame(() => { this.waiting = null; this.draw(turn); });
  }

  draw(turn) {
    this.folded.hidden = !turn.reasoning;
    if (turn.reasoning) {
      this.summary.textContent = turn.text ? "Reasoning" : "Reasoning …";
      this.reasoning.textContent = turn.reasoning;
    }
    this.text.replaceChildren(markdown(turn.text));
  }

  // The turn as it stands at the end: `last` may be asked again.
  end(turn, last) {
    cancelAnimationFrame(this.waiting);
    this.waiting = null;
    this.text.classList.remove("busy");
    this.draw(turn);
    const { told = {} } = turn;
    this.below.replaceChildren(
      ...(turn.failed ? [element("p", { className: "failed", textContent: turn.failed })] : []),
      facts({
        model: told.model, cache: told.cache, "first token": told.first && seconds(told.first), total: told.ms && seconds(told.ms),
        tokens: tokens(told.usage), ended: told.ended,
      }),
      element("div", { className: "actions" }, copyButton("Copy", () => turn.text),
        button(last ? "Regenerate" : "Regenerate from here", this.does.regenerate),
        button("Copy as …", this.does.code)));
    return this.element;
  }
}
