// What the pages share: the key, kept for this tab alone, and requests that ask for it when it is missing.

export const $ = (id) => document.getElementById(id);

let key = sessionStorage.getItem("qvl-key") ?? "";

export function askForKey() {
  const dialog = $("key-dialog");
  $("key").value = "";
  dialog.showModal();
  return new Promise((resolve) => {
    dialog.addEventListener("close", () => {
      if (dialog.returnValue === "ok") {
        key = $("key").value.trim();
        sessionStorage.setItem("qvl-key", key);
      }
      resolve(dialog.returnValue === "ok");
    }, { once: true });
  });
}

export async function call(path, options = {}) {
  const headers = { ...options.headers };
  if (key) headers.Authorization = `Bearer ${key}`;
  const answer = await fetch(path, { ...options, headers });
  if (answer.status === 401 && (await askForKey())) return call(path, options);
  return answer;
}

export async function errorOf(answer) {
  try {
    return (await answer.json()).error.message;
  } catch {
    return `${answer.status} ${answer.statusText}`;
  }
}
