// What this browser keeps, in IndexedDB: the history with its pictures, and batches.

const STORES = { entries: "id", bodies: "id", batches: "id", lines: ["batch", "number"] };
let opening = null;

const settled = (request) => new Promise((resolve, reject) => {
  request.onsuccess = () => resolve(request.result);
  request.onerror = () => reject(request.error);
});

function open() {
  opening ??= new Promise((resolve, reject) => {
    if (!globalThis.indexedDB) throw new Error("it has no IndexedDB");
    const request = indexedDB.open("qvl", 1);
    request.onupgradeneeded = () => {
      for (const [name, keyPath] of Object.entries(STORES)) request.result.createObjectStore(name, { keyPath });
    };
    request.onsuccess = () => {
      // A newer page in another tab may change the stores; this one opens them anew when it needs them.
      request.result.onversionchange = () => { request.result.close(); opening = null; };
      resolve(request.result);
    };
    request.onerror = () => reject(request.error);
  });
  opening.catch(() => { opening = null; });
  return opening;
}

// One transaction: `work(store by name)` issues its requests at once and returns one of them, or nothing.
export async function transaction(names, mode, work) {
  const database = await open();
  return new Promise((resolve, reject) => {
    const all = database.transaction(names, mode);
    let request;
    all.oncomplete = () => resolve(request?.result);
    all.onabort = () => reject(all.error ?? new Error("the browser gave it up"));
    request = work(Object.fromEntries(names.map((name) => [name, all.objectStore(name)])));
  });
}

export const get = async (name, key) => settled((await open()).transaction(name).objectStore(name).get(key));
export const all = async (name, range) => settled((await open()).transaction(name).objectStore(name).getAll(range));
