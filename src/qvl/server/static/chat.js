// The conversation: send, stop, edit and resend, regenerate.
import { askChat, chatBody } from "./api.js";
import { fresh, messagesOf, titleOf, withNames } from "./conversation.js";
import { $, fail } from "./dom.js";
import { changedHistory, keep } from "./history.js";
import { addRead, current, setLastAsked, takeForTurn, whenRead } from "./pictures.js";
import { openPicture } from "./picture_dialog.js";
import { setSettings, settings, wrongSetting } from "./settings.js";
import { openCode } from "./code_dialog.js";
import { AnswerTurn, editedTurn, userTurn } from "./turns.js";

let conversation = fresh();
let underWay = null; // an AbortController
let edited = null;

export const currentConversation = () => conversation;

export function openConversation(other) {
  underWay?.abort();
  conversation = other;
  edited = null;
  setSettings({ ...settings(), system: null, ...conversation.settings });
  setLastAsked(conversation.turns.findLast(({ role }) => role === "user")?.pictures ?? []);
  fail("");
  show();
}

export function newConversation() {
  openConversation({ ...fresh(), settings: { system: settings().system } });
  setLastAsked([]);
  $("question").focus();
}

function show() {
  const { turns } = conversation;
  $("conversation").replaceChildren(...turns.map((turn, index) => {
    if (turn.role === "assistant") {
      return new AnswerTurn(answerDoes(index)).end(turn, index === turns.length - 1);
    }
    if (turn === edited) return editedTurn(turn, editDoes(index));
    return userTurn(turn, { open: openPicture, edit: () => { edited = turn; show(); focusEdited(); } }, underWay !== null);
  }));
  showComposer();
}

const focusEdited = () => $("conversation").querySelector(".edited textarea").focus();

function answerDoes(index) {
  const before = () => conversation.turns.slice(0, index);
  return {
    regenerate: () => ask(before(), { ...settings(), cache: "fresh" }),
    code: () => {
      const asked = conversation.turns[index].settings ?? settings();
      openCode("v1/chat/completions", chatBody(asked, messagesOf(before(), asked.system)), asked);
    },
  };
}

function editDoes(index) {
  return {
    cancel: () => { edited = null; show(); },
    send: (text, pictures) => {
      edited = null;
      ask([...conversation.turns.slice(0, index), { role: "user", text, pictures }], settings());
    },
  };
}

function showComposer() {
  const busy = underWay !== null;
  const any = conversation.turns.length > 0;
  $("conversation-card").hidden = !any || $("panel-ask").hidden;
  $("send").disabled = busy;
  $("stop").hidden = !busy;
  const again = any && !$("question").value.trim() && !current().length;
  $("send").textContent = again ? "Ask again" : "Ask";
  $("question").placeholder = any ? "And what …? (empty: the last question again)" : "What brand is it?";
}

async function ask(turns, wanted) {
  if (underWay) return;
  const wrong = wrongSetting();
  if (wrong) {
    fail(wrong);
    return;
  }
  fail("");
  const mine = conversation;
  const controller = new AbortController();
  underWay = controller;
  const before = mine.turns;
  const answer = { role: "assistant", text: "", reasoning: "", settings: wanted };
  mine.turns = [...turns, answer];
  mine.settings = { ...wanted, cache: "use" };
  show();
  const view = new AnswerTurn(answerDoes(turns.length));
  view.busy(answer);
  $("conversation").lastElementChild.replaceWith(view.element);
  view.element.scrollIntoView({ block: "nearest" });
  try {
    await whenRead(turns.flatMap((turn) => turn.pictures ?? []), controller.signal);
    if (conversation === mine) redrawUser(turns);
    const told = await askChat(wanted, messagesOf(turns, wanted.system), (found) => {
      Object.assign(answer, { text: found.text, reasoning: found.reasoning, told: { ...found, model: wanted.model } });
      view.busy(answer);
    }, controller.signal);
    answer.told = { ...told, model: wanted.model };
  } catch (error) {
    const stopped = error.name === "AbortError";
    if (!stopped) fail(withNames(error.message, turns, wanted.system));
    if (answer.text || answer.reasoning) {
      answer.told = { ...answer.told, ended: stopped ? "stopped" : "cut off" };
      if (!stopped) answer.failed = withNames(error.message, turns, wanted.system);
    } else {
      giveBack(mine, before, answer, withNames(error.message, turns, wanted.system));
    }
  } finally {
    underWay = null;
    delete answer.told?.text;
    delete answer.told?.reasoning;
    if (conversation === mine) show();
  }
  if (mine.turns.length) {
    await keep({ ...mine, title: titleOf(mine), thumbnail: mine.turns.find(({ pictures }) => pictures?.length)?.pictures[0] });
    changedHistory();
  }
}

function redrawUser(turns) {
  const items = $("conversation").children;
  turns.forEach((turn, index) => {
    if (turn.role === "user") items[index].replaceWith(userTurn(turn, { open: openPicture }, true));
  });
}

// Nothing was answered. A new question goes back to where it was typed, to be changed and sent; a changed one stays.
function giveBack(mine, before, answer, message) {
  const question = mine.turns.at(-2);
  if (before.includes(question)) {
    mine.turns = before;
  } else if (mine.turns.length - 2 < before.length) {
    answer.failed = message;
  } else if (conversation === mine) {
    mine.turns = before;
    if (!$("question").value.trim()) $("question").value = question.text;
    addRead(question.pictures.filter((picture) => !picture.failed));
  }
}

function send() {
  const typed = $("question").value.trim();
  const { turns } = conversation;
  if (turns.length && !typed && !current().length) {
    const last = turns.findLastIndex(({ role }) => role === "user");
    ask(turns.slice(0, last + 1), settings());
    return;
  }
  if (underWay || wrongSetting()) {
    fail(wrongSetting() ?? "");
    return;
  }
  const text = typed || "What brand is it?";
  $("question").value = "";
  const pictures = takeForTurn();
  ask([...turns, { role: "user", text, pictures }], settings());
}

export function startChat() {
  $("panel-ask").addEventListener("submit", (event) => {
    event.preventDefault();
    send();
  });
  $("question").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) $("send").form.requestSubmit();
  });
  $("question").addEventListener("input", showComposer);
  new MutationObserver(showComposer).observe($("pictures"), { childList: true });
  $("stop").onclick = () => underWay?.abort();
  $("new").onclick = newConversation;
  showComposer();
}
