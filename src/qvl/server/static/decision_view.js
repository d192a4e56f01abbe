// Answers with a fixed set of answers, as bars.
import { element } from "./dom.js";
import { barOf, joined, percent, why } from "./fields_view.js";

// An answer in one word, and how probable it is: {said, sure}.
export function decided(answer) {
  if (answer.type === "refusal") return { said: "cannot tell", sure: null };
  if (answer.type === "predicate") return { said: answer.probability >= 0.5 ? "yes" : "no", sure: Math.max(answer.probability, 1 - answer.probability) };
  const best = answer.probabilities.reduce((a, b) => (b.probability > a.probability ? b : a));
  return { said: best.label ?? String(best.value), sure: best.probability };
}

function shares(answer) {
  if (answer.type === "predicate") return [["yes", answer.probability], ["no", 1 - answer.probability]];
  return answer.probabilities.map((one) => [one.label ?? String(one.value), one.probability]);
}

function answerView(answer, name) {
  const line = element("div", { className: "decision", data: { path: name } }, element("h4", { textContent: name }));
  if (answer.type === "refusal") {
    line.append(element("p", { className: "untold" }, element("strong", { textContent: "cannot tell" }), ` (${why(answer.reason)})`));
    if (Number.isFinite(answer.raw_confidence)) line.append(barOf(name, answer.confidence, answer.raw_confidence, true));
    return line;
  }
  const best = decided(answer).said;
  line.append(...shares(answer).map(([label, share]) => element("div", { className: label === best ? "share best" : "share" },
    element("span", { className: "name", textContent: label }),
    element("meter", { min: 0, max: 1, value: share, ariaLabel: `probability of ${label}` }),
    element("span", { className: "figure", textContent: percent(share) }))));
  if (Number.isFinite(answer.raw_confidence)) {
    line.append(element("p", { className: "sure" }, `${best} is right with`, barOf(best, answer.confidence, answer.raw_confidence, true)));
  }
  const mass = answer.label_mass;
  const told = [
    answer.type === "score" ? `score ${answer.score.toFixed(2)}` : null,
    Number.isFinite(mass) ? `the model's next words are one of these with ${percent(mass)}${mass < 0.1 ? ": the bars say little" : ""}` : null,
  ].filter(Boolean).join(" · ");
  line.append(element("p", { className: "how", textContent: told }));
  return line;
}

export const decisionView = (picture, found, questions) =>
  joined(picture, [], found.answers.map((answer, index) => answerView(answer, questions[index].instructions)));
