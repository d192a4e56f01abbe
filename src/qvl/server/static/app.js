// The page: its parts put together, and the state of the server.
import { dropOnBatch, startBatch } from "./batch.js";
import { currentConversation, openConversation, startChat } from "./chat.js";
import { showCompare, startCompare } from "./compare.js";
import { fromShared, toShared } from "./conversation.js";
import { $, download, element, fail } from "./dom.js";
import { changedHistory, onOpen, startHistory } from "./history.js";
import { startPictureDialog } from "./picture_dialog.js";
import { add, choose, current, show as showPictures } from "./pictures.js";
import { pictureTokens } from "./picture_tokens.js";
import { showRun, startEachPicture } from "./each_picture.js";
import { askForKey, call } from "./session.js";
import { loadModels, onSettings, startSettings } from "./settings.js";
import { chosenTab, showTab, startTabs } from "./tabs.js";

const SAMPLES = ["sample-mug.png", "sample-shoe.webp", "sample-chair.png", "sample-watch.png"];

function chooseTab(name) {
  showTab(name);
  choose(name === "ask" ? "chat" : "work");
  $("conversation-card").hidden = name !== "ask" || !currentConversation().turns.length;
  $("drop").hidden = name === "batch";
  showRun(name);
  showCompare();
  $("batches-card").hidden = name !== "batch" || !$("batches").childElementCount;
  fail("");
}

function startDropping() {
  const drop = $("drop");
  // Not for the input itself: its click comes up here, and would open a second chooser.
  drop.addEventListener("click", (event) => {
    if (event.target === drop || event.target.id === "choose") $("files").click();
  });
  $("files").addEventListener("change", () => { add($("files").files); $("files").value = ""; });
  for (const kind of ["dragover", "dragenter"]) {
    document.addEventListener(kind, (event) => { event.preventDefault(); drop.classList.add("over"); });
  }
  document.addEventListener("dragleave", (event) => { if (!event.relatedTarget) drop.classList.remove("over"); });
  document.addEventListener("drop", (event) => {
    event.preventDefault();
    drop.classList.remove("over");
    if (chosenTab() === "batch") {
      dropOnBatch(event.dataTransfer).catch((error) => fail(`The folder cannot be read: ${error.message}`));
      return;
    }
    const files = [...event.dataTransfer.files];
    if (files.length === 1 && files[0].name.endsWith(".json")) openShared(files[0]);
    else add(files);
  });
  document.addEventListener("paste", (event) => { if (event.clipboardData.files.length) add(event.clipboardData.files); });
}

function startSamples() {
  $("samples").append("Samples: ", ...SAMPLES.map((name) => {
    const press = element("button", { type: "button", className: "sample", ariaLabel: `Add ${name}` },
      element("img", { src: `static/${name}`, alt: "", loading: "lazy" }));
    press.onclick = async () => {
      try {
        const blob = await (await fetch(`static/${name}`)).blob();
        add([new File([blob], name, { type: blob.type })]);
      } catch {
        fail(`${name} cannot be fetched: the server cannot be reached`);
      }
    };
    return press;
  }));
}

async function openShared(file) {
  try {
    openConversation(await fromShared(await file.text()));
    chooseTab("ask");
  } catch (error) {
    fail(`${file.name}: ${error.message}`);
  }
}

function startSharing() {
  $("share").onclick = () => {
    const shared = toShared(currentConversation());
    download("conversation.json", "application/json", JSON.stringify(shared, null, 2));
  };
  $("open-file").onclick = () => $("conversation-file").click();
  $("conversation-file").onchange = () => {
    openShared($("conversation-file").files[0]);
    $("conversation-file").value = "";
  };
  onOpen("chat", (body) => { openConversation(body); chooseTab("ask"); });
}

function startPanels() {
  for (const name of ["history", "settings"]) {
    const press = $(`${name}-button`);
    const panel = $(`${name}-panel`);
    const show = (open) => {
      panel.hidden = !open;
      press.ariaExpanded = String(open);
    };
    press.onclick = () => {
      show(panel.hidden);
      if (panel.hidden) return;
      if (name === "history") changedHistory();
      panel.scrollIntoView({ block: "nearest" });
      panel.querySelector("textarea, input, button:not([hidden])")?.focus();
    };
    panel.addEventListener("keydown", (event) => {
      if (event.key !== "Escape") return;
      show(false);
      press.focus();
    });
  }
}

// What the pictures will take with the settings as they stand.
async function showPictureTokens() {
  const pictures = current().filter(({ width, seconds }) => width && !seconds);
  const told = await Promise.all(pictures.map(pictureTokens));
  $("picture-tokens").textContent = pictures.length
    ? pictures.map(({ name }, index) => `${name}: ${told[index]}`).join("; ") : "A token is 32 × 32 pixels of the picture as it is shown to the model.";
}

async function state() {
  try {
    const answer = await call("ready", { cache: "no-store" });
    $("state").textContent = answer.ok ? "ready" : (await answer.json()).reason ?? "not ready";
    $("state").classList.toggle("ready", answer.ok);
  } catch {
    $("state").textContent = "the server cannot be reached";
    $("state").classList.remove("ready");
  }
  return $("state").classList.contains("ready");
}

async function start() {
  await state();
  await loadModels().catch(() => {});
}

startSettings();
startTabs(chooseTab);
startDropping();
startSamples();
startSharing();
startPanels();
startPictureDialog();
startHistory();
startChat();
startEachPicture(chooseTab);
startCompare(chooseTab);
startBatch();
onSettings(() => { showPictures(); showPictureTokens(); });
new MutationObserver(showPictureTokens).observe($("pictures"), { childList: true });
$("keys").onclick = async () => { if (await askForKey()) start(); };
window.addEventListener("online", state);
let loaded = false;
start();
setInterval(async () => {
  if (document.hidden || $("key-dialog").open) return;
  const ready = await state();
  // What a model can do is known once it is loaded.
  if (ready && !loaded) await loadModels().catch(() => {});
  loaded = ready;
}, 10000);
