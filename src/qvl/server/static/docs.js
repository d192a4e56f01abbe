// Every operation of openapi.json with its example, which can be changed and sent.
import { $, element } from "./dom.js";
import { call, errorOf } from "./session.js";

function operation(document_, path, method, told) {
  const example = told.requestBody?.content["application/json"]?.example;
  const body = element("textarea", { className: "code", rows: 12, ariaLabel: "Body", spellcheck: false });
  body.value = example ? JSON.stringify(example, null, 2) : "";
  const name = element("input", { type: "text", ariaLabel: "Path", value: path });
  const send = element("button", { type: "button", textContent: "Send" });
  const answer = element("pre", { ariaLive: "polite" });
  send.onclick = async () => {
    send.disabled = true;
    const options = { method: method.toUpperCase(), cache: "no-store" };
    if (example) Object.assign(options, { body: body.value, headers: { "Content-Type": "application/json" } });
    try {
      const got = await call(name.value.slice(1), options);
      const text = await got.text();
      let shown = text;
      try { shown = JSON.stringify(JSON.parse(text), null, 2); } catch { /* events and metrics are shown as they are */ }
      answer.textContent = `${got.status}\n${shown}`;
    } catch (error) {
      answer.textContent = error.message;
    }
    send.disabled = false;
  };
  const statuses = Object.entries(told.responses).map(([status, { description }]) => `${status} ${description}`).join("\n");
  return element("details", {},
    element("summary", {}, element("b", { textContent: method.toUpperCase() }), ` ${path} — ${told.summary ?? ""}`),
    element("p", { textContent: told.description ?? "" }),
    ...(path.includes("{") ? [name] : []), ...(example ? [body] : []),
    element("div", { className: "row" }, send), answer, element("pre", { textContent: statuses }));
}

const got = await call("openapi.json");
if (got.ok) {
  const told = await got.json();
  $("operations").append(...Object.entries(told.paths).flatMap(([path, methods]) =>
    Object.entries(methods).map(([method, one]) => operation(told, path, method, one))));
} else {
  $("operations").textContent = await errorOf(got);
}
