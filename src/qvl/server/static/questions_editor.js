// The questions of the tab Decide: yes or no, one of several, a place on a scale.
import { $, element } from "./dom.js";

const TYPES = { predicate: "yes or no", choice: "one of", score: "scale, lowest first" };
let questions = [{ type: "predicate", text: "", options: "" }];

// The questions in the form of the API. What is wrong is thrown in words.
export function editedQuestions() {
  const asked = questions.filter(({ text }) => text.trim());
  if (!asked.length) throw new Error("Write a question first.");
  return asked.map(({ type, text, options }) => {
    const told = { type, name: text.trim().slice(0, 60), instructions: text.trim() };
    if (type === "predicate") return told;
    const listed = options.split(",").map((one) => one.trim()).filter(Boolean);
    if (listed.length < 2) throw new Error(`${text.trim()}: list its answers, with commas between.`);
    return type === "choice" ? { ...told, choices: listed.map((value) => ({ value })) }
      : { ...told, levels: listed.map((label) => ({ label })) };
  });
}

export function setQuestions(told) {
  questions = told.map(({ type, instructions, choices, levels }) => ({
    type, text: instructions, options: (choices ?? levels ?? []).map((one) => one.value ?? one.label).join(", "),
  }));
  show();
}

function show() {
  $("question-rows").replaceChildren(...questions.map((question, index) => {
    const number = index + 1;
    const set = (name) => (event) => { question[name] = event.target.value; };
    const type = element("select", { ariaLabel: `Kind of question ${number}`, onchange: (event) => { question.type = event.target.value; show(); } },
      ...Object.entries(TYPES).map(([value, textContent]) => element("option", { value, textContent, selected: value === question.type })));
    const options = question.type === "predicate" ? null : element("input", {
      type: "text", ariaLabel: `Answers of question ${number}`, value: question.options, oninput: set("options"),
      placeholder: question.type === "choice" ? "red, blue, green" : "badly, fairly, well",
    });
    const away = element("button", { type: "button", className: "away", textContent: "×", ariaLabel: `Remove question ${number}` });
    away.onclick = () => { questions.splice(index, 1); show(); };
    return element("li", {}, element("input", {
      type: "text", ariaLabel: `Question ${number}`, value: question.text, placeholder: "Is it new?", oninput: set("text"),
    }), type, options, away);
  }));
}

export function startQuestions() {
  $("add-question").onclick = () => {
    questions.push({ type: "predicate", text: "", options: "" });
    show();
    $("question-rows").lastElementChild.querySelector("input").focus();
  };
  show();
}
