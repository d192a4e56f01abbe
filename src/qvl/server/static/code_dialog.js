// "Copy as …": a request as code, in a dialog with a tab for each language.
import { cacheControl } from "./api.js";
import { $, copyButton, element } from "./dom.js";
import { hasKey } from "./session.js";
import { LANGUAGES } from "./snippets.js";

let request = null;
let language = Object.keys(LANGUAGES)[0];

// `path` is the route, `body` what it is sent.
export function openCode(path, body, settings) {
  request = {
    path, body, control: cacheControl(settings), key: hasKey(),
    base: new URL("v1", document.baseURI).href,
  };
  show();
  $("code-dialog").showModal();
}

function show() {
  $("code-languages").replaceChildren(...Object.keys(LANGUAGES).map((name) => element("label", {}, element("input", {
    type: "radio", name: "language", value: name, checked: name === language, onchange: () => { language = name; show(); },
  }), name)));
  const code = LANGUAGES[language](request);
  $("code").textContent = code;
  $("code-note").textContent = [
    `${Math.ceil(code.length / 1000)} kB, pictures included.`,
    request.key ? "It reads the API key from the variable QVL_API_KEY." : "",
  ].join(" ");
  $("code-copy").replaceChildren(copyButton("Copy", () => code));
}
