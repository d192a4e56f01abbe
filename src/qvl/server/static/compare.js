// The tab Compare: one question to two models, or with two settings, side by side.
import { askChat, chatBody } from "./api.js";
import { openCode } from "./code_dialog.js";
import { messagesOf, withNames } from "./conversation.js";
import { $, button, copyButton, element, facts, fail, seconds, tokens } from "./dom.js";
import { changedHistory, keep, onOpen } from "./history.js";
import { markdown } from "./markdown.js";
import { current, replaceAll, whenRead } from "./pictures.js";
import { models, onSettings, settings, wrongSetting } from "./settings.js";

const SIDES = ["a", "b"];
const NUMBERS = ["temperature", "max_tokens", "max_pixels"];
let run = null; // {id, kind, question, pictures, sides: [{settings, text, reasoning, told, failed}]}
let underWay = null;

// The settings of the drawer, with what one side says instead.
function sideSettings(side) {
  const own = { ...settings(), cache: $("compare-anew").checked ? "fresh" : settings().cache };
  if ($(`model-${side}`).value) own.model = $(`model-${side}`).value;
  for (const name of NUMBERS) {
    const field = $(`${name}-${side}`);
    if (!field.checkValidity()) throw new Error(`${side.toUpperCase()}, ${field.labels[0].firstChild.textContent.trim()}: ${field.validationMessage}`);
    if (field.value.trim()) own[name] = Number(field.value);
  }
  return own;
}

function showModels() {
  for (const side of SIDES) {
    const chosen = $(`model-${side}`).value;
    $(`model-${side}`).replaceChildren(element("option", { value: "", textContent: "as above" }),
      ...models().map(({ id }) => element("option", { value: id, textContent: id })));
    $(`model-${side}`).value = models().some(({ id }) => id === chosen) ? chosen : "";
  }
}

const different = (own, other) => ["model", "temperature", "top_p", "seed", "max_tokens", "max_pixels", "min_pixels"]
  .filter((name) => own[name] !== other[name]).map((name) => `${name}: ${own[name] ?? "the server's"}`).join(", ");

function sideView(side, number) {
  const other = run.sides[1 - number];
  const text = element("div", { className: "answer" }, markdown(side.text));
  const { told = {} } = side;
  return element("article", { className: "side" },
    element("h3", { textContent: "AB"[number] }, element("span", { className: "how", textContent: ` ${different(side.settings, other.settings)}` })),
    side.reasoning ? element("details", { className: "thought" }, element("summary", { textContent: "Reasoning" }),
      element("pre", { className: "reasoning", textContent: side.reasoning, tabIndex: 0 })) : null,
    text, side.failed ? element("p", { className: "failed", textContent: side.failed }) : null,
    facts({
      model: told.model, cache: told.cache, "first token": told.first && seconds(told.first), total: told.ms && seconds(told.ms),
      tokens: tokens(told.usage), "tokens a second": rate(told), ended: told.ended,
    }),
    element("div", { className: "actions" }, copyButton("Copy", () => side.text), button("Copy as …", () =>
      openCode("v1/chat/completions", chatBody(side.settings, messages(side)), side.settings))));
}

const FEWEST = 10; // tokens, below which a rate says nothing
const rate = ({ usage, ms, first }) => (usage?.completion_tokens >= FEWEST && ms > first
  ? ((usage.completion_tokens - 1) / ((ms - first) / 1000)).toFixed(1) : null);
const turn = () => ({ role: "user", text: run.question, pictures: run.pictures });
const messages = (side) => messagesOf([turn()], side.settings.system);

function show() {
  $("compare-result").hidden = !run || $("panel-compare").hidden;
  $("compare").disabled = underWay !== null;
  $("stop-compare").hidden = underWay === null;
  if (!run) return;
  const done = run.sides.every(({ told }) => told?.ended);
  const same = run.sides[0].text.trim() === run.sides[1].text.trim();
  $("compare-result").replaceChildren(
    element("h2", { textContent: run.question }),
    element("p", { className: "how", attributes: { role: "status" }, textContent: done ? (same ? "The answers are the same." : "The answers differ.") : "" }),
    element("div", { className: "sides" }, ...run.sides.map(sideView)));
}

async function askSide(side, mine, signal) {
  let waiting = null;
  try {
    await askChat(side.settings, messages(side), (found) => {
      Object.assign(side, { text: found.text, reasoning: found.reasoning, told: { ...found, model: side.settings.model } });
      waiting ??= requestAnimationFrame(() => { waiting = null; if (run === mine) show(); });
    }, signal);
  } catch (error) {
    side.failed = error.name === "AbortError" ? "stopped" : withNames(error.message, [turn()], side.settings.system);
  }
  delete side.told?.text;
  delete side.told?.reasoning;
}

async function ask() {
  if (underWay) return;
  let sides;
  try {
    const wrong = wrongSetting();
    if (wrong) throw new Error(wrong);
    sides = SIDES.map((side) => ({ settings: sideSettings(side), text: "", reasoning: "" }));
  } catch (error) {
    fail(error.message);
    return;
  }
  fail("");
  const field = $("compare-question");
  const mine = {
    id: crypto.randomUUID?.() ?? `${Date.now()}-${Math.random()}`, kind: "compare", question: field.value.trim() || field.placeholder,
    pictures: [...current()], sides,
  };
  run = mine;
  underWay = new AbortController();
  show();
  try {
    await whenRead(mine.pictures, underWay.signal);
    await Promise.all(sides.map((side) => askSide(side, mine, underWay.signal)));
  } catch (error) {
    if (error.name !== "AbortError") fail(error.message);
  }
  underWay = null;
  if (run === mine) show();
  if (!sides.some(({ text }) => text)) return;
  await keep({ ...mine, title: mine.question, thumbnail: mine.pictures[0] });
  changedHistory();
}

export function showCompare() {
  show();
}

export function startCompare(chooseTab) {
  $("panel-compare").addEventListener("submit", (event) => {
    event.preventDefault();
    ask();
  });
  $("compare-question").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) $("compare").form.requestSubmit();
  });
  $("stop-compare").onclick = () => underWay?.abort();
  onSettings(showModels);
  onOpen("compare", (kept) => {
    underWay?.abort();
    run = kept;
    $("compare-question").value = kept.question;
    chooseTab("compare");
    replaceAll(kept.pictures);
  });
}
