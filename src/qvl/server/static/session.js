// What the pages share: the key, kept for this tab alone, and requests that ask for it when it is missing.
import { $ } from "./dom.js";

let key = sessionStorage.getItem("qvl-key") ?? "";
let asking = null;

export const hasKey = () => key !== "";

// One dialog, however many requests were refused.
export function askForKey() {
  asking ??= new Promise((resolve) => {
    const dialog = $("key-dialog");
    $("key").value = "";
    dialog.returnValue = "";
    dialog.showModal();
    dialog.addEventListener("close", () => {
      asking = null;
      if (dialog.returnValue === "ok") {
        key = $("key").value.trim();
        sessionStorage.setItem("qvl-key", key);
      }
      resolve(dialog.returnValue === "ok");
    }, { once: true });
  });
  return asking;
}

export async function call(path, options = {}) {
  const headers = { ...options.headers };
  const used = key;
  if (used) headers.Authorization = `Bearer ${used}`;
  let answer;
  try {
    answer = await fetch(path, { ...options, headers });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw Object.assign(new Error("The server cannot be reached. Nothing is lost: ask again when it is back."), { lost: true });
  }
  // A key that came in the meantime is tried first.
  if (answer.status === 401 && (key !== used || (await askForKey()))) return call(path, options);
  return answer;
}

export async function errorOf(answer) {
  try {
    return (await answer.json()).error.message;
  } catch {
    return `${answer.status} ${answer.statusText}`;
  }
}
