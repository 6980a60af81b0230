// The page for people: choose a model, ask it, see its answer and its replicas.

import * as answers from "./answers.js";
import { VERBS, amount, element, languageName, serverWords, showAbout, showModels, showServer, task, verb } from "./models.js";
import { Refusal, ask, getModels, key } from "./wire.js";

const LOOK_EVERY_MS = 4000;

let models = [];
let chosen = null; // name of the model
let image = null; // { name, base64 }
let running = null; // AbortController of the request in flight
let lookTimer = null;
let numLooks = 0;
let isKeyAwaited = false;
const drafts = new Map(); // what was typed: of all models of text together, of each task of its own

const model = () => models.find((each) => each.name === chosen);
const draftOf = (each) => (each.inputs === "inputs" ? each.name : "text of any model");

// The models, again and again.

async function look() {
  clearTimeout(lookTimer);
  const number = ++numLooks;
  try {
    const found = await getModels();
    if (number !== numLooks) return; // asked again meanwhile
    models = found;
    if (isKeyAwaited) showKeyPanel((isKeyAwaited = false));
    showServer(models.every((each) => each.state === "ready") ? "is-ready" : "is-waiting", serverWords(models));
    if (!model()) choose(hashedName() ?? models[0]?.name ?? null);
    showModels(models, chosen, choose);
    if (model()) showAbout(model());
  } catch (error) {
    if (number !== numLooks) return;
    showServer("is-bad", error instanceof Refusal ? `the server refuses: ${error.message}` : "the server does not answer; looking again");
    if (error.status === 401) askForKey(error);
  }
  if (!document.hidden) lookTimer = setTimeout(look, LOOK_EVERY_MS);
}

function hashedName() {
  const hash = location.hash.slice(1);
  return models.find((each) => encodeURIComponent(each.name) === hash)?.name ?? null;
}

function choose(name) {
  running?.abort();
  if (model()) drafts.set(draftOf(model()), element("text").value);
  chosen = name;
  const now = model();
  element("ask").hidden = !now;
  element("about").hidden = !now;
  if (!now) return;
  history.replaceState(null, "", `#${encodeURIComponent(name)}`);
  const isImage = now.inputs === "images";
  element("title").textContent = now.name;
  element("subtitle").textContent = task(now);
  element("for-image").hidden = !isImage;
  element("for-text").hidden = isImage;
  element("shortcut").hidden = isImage;
  element("options").hidden = verb(now) !== "translate";
  element("text-label").textContent = textLabel(now);
  element("text").lang = now.source ?? "";
  element("text").classList.toggle("is-code", now.inputs === "inputs");
  element("text").value = drafts.get(draftOf(now)) ?? (now.inputs === "inputs" ? template(now) : "");
  element("send").textContent = VERBS[verb(now)];
  answers.clear();
  showModels(models, chosen, choose);
  showAbout(now);
  inputChanged();
}

function textLabel(now) {
  if (now.inputs === "inputs") return "One input, as JSON";
  return now.source ? `Text in ${languageName(now.source)}` : "Text";
}

function template(now) {
  return JSON.stringify(Object.fromEntries((now.columns ?? []).map((column) => [column, ""])), null, 2);
}

// What is asked.

function body() {
  const now = model();
  if (now.inputs === "images") return { images: [image.base64] };
  const text = element("text").value;
  if (now.inputs === "inputs") return { inputs: [JSON.parse(text)] };
  const asked = { text };
  if (verb(now) === "translate") {
    for (const [name, id] of [["num_beams", "beams"], ["max_new_tokens", "longest"]]) {
      if (element(id).value) asked[name] = Number(element(id).value);
    }
  }
  return asked;
}

function isAskable() {
  const now = model();
  if (!now) return false;
  if (now.inputs === "images") return image !== null;
  const text = element("text").value;
  if (now.inputs !== "inputs") return text !== "";
  try {
    return JSON.parse(text) !== undefined;
  } catch {
    return false;
  }
}

function inputChanged() {
  const now = model();
  if (!now) return;
  element("send").disabled = running !== null || !isAskable();
  const limit = now.inputs === "text" ? now.limits?.max_item_characters : undefined;
  const number = [...element("text").value].length; // as the server counts: characters, not halves of them
  const isOver = limit !== undefined && number > limit;
  let words = `${amount(number)} characters`;
  if (limit !== undefined) words = `${amount(number)} of ${amount(limit)} characters`;
  if (now.inputs === "inputs" && !isAskable()) words = "not JSON yet";
  element("count").textContent = isOver ? `${words}: ${amount(number - limit)} too many` : words;
  element("count").classList.toggle("is-over", isOver);
  element("text").setAttribute("aria-invalid", String(isOver));
  showCurl(now);
}

function showCurl(now) {
  const address = new URL(now.path.slice(1), document.baseURI);
  address.hash = "";
  const data = isAskable() && now.inputs !== "images" ? JSON.stringify(body()) : '{"images": ["\'"$(base64 < image.png | tr -d \'\\n\')"\'"]}';
  const quoted = now.inputs === "images" ? data : data.replaceAll("'", "'\\''");
  const withKey = key.get() ? ' -H "authorization: Bearer $EAGLERAY_KEY"' : "";
  const isReady = now.inputs === "images" || isAskable();
  element("curl-details").hidden = !isReady;
  element("curl").textContent = `curl -s ${address}${withKey} -H 'content-type: application/json' -d '${quoted}'`;
}

// The request.

async function send() {
  const now = model();
  if (running || !isAskable()) return;
  const controller = (running = new AbortController());
  answers.begin();
  element("stop").hidden = false;
  inputChanged();
  let parts = 0;
  const onPartial = (item) => {
    parts += 1;
    answers.showText(item.text, now.target);
  };
  try {
    const grows = verb(now) === "translate";
    const found = await ask(now.path.slice(1), body(), { signal: controller.signal, grows, onPartial });
    if (chosen !== now.name) return;
    answers.showAnswer(now, found);
    answers.showFacts(found.answer.version, found);
  } catch (error) {
    if (chosen !== now.name) return;
    failed(error, controller, parts);
  } finally {
    running = null;
    element("stop").hidden = true;
    if (chosen === now.name) answers.end();
    inputChanged();
  }
}

function failed(error, controller, parts) {
  if (controller.signal.aborted) {
    answers.say(parts ? "Stopped: this is how far it came." : "Stopped before the first word.");
    return;
  }
  if (!parts) answers.showNone("No answer.");
  answers.say(parts ? "This is how far it came." : "");
  answers.showProblem(error, send);
  if (error.status === 401) askForKey(error);
  if (!(error instanceof Refusal)) look();
}

// The key.

function showKeyPanel(isShown) {
  element("key-panel").hidden = !isShown;
  element("key-button").setAttribute("aria-expanded", String(isShown));
}

function showKeyButton() {
  element("key-button").textContent = key.get() ? "Key in use" : "Key";
}

function askForKey(error) {
  isKeyAwaited = true;
  const wasHidden = element("key-panel").hidden;
  const words = `The server says: ${error.message}.`;
  if (element("key-words").textContent !== words) element("key-words").textContent = words;
  showKeyPanel(true);
  if (wasHidden) element("key").focus();
}

function useKey(value) {
  if (value) key.set(value);
  else key.forget();
  element("key").value = "";
  showKeyButton();
  isKeyAwaited = Boolean(value);
  element("key-words").textContent = value ? "Asking with this key." : "No key is kept any more.";
  look();
}

// The image.

async function takeImage(file) {
  if (!file) return;
  const words = element("image-words");
  image = null;
  try {
    const picture = await createImageBitmap(file);
    draw(picture);
    words.textContent = `${file.name || "pasted"}: ${picture.width} x ${picture.height}, ${amount(Math.ceil(file.size / 1024))} kB`;
    image = { base64: await base64(file) };
  } catch {
    element("preview").hidden = true;
    words.textContent = `${file.name || "this"} is not an image that the browser can read.`;
  }
  inputChanged();
}

function draw(picture) {
  const canvas = element("preview");
  const scale = Math.min(1, 320 / picture.width, 320 / picture.height);
  const isTiny = picture.width <= 64 && picture.height <= 64;
  canvas.width = Math.max(1, Math.round(picture.width * scale));
  canvas.height = Math.max(1, Math.round(picture.height * scale));
  canvas.getContext("2d").drawImage(picture, 0, 0, canvas.width, canvas.height);
  canvas.classList.toggle("is-tiny", isTiny);
  canvas.style.width = isTiny ? "8rem" : "";
  canvas.hidden = false;
}

function base64(file) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result.slice(reader.result.indexOf(",") + 1));
    reader.onerror = () => reject(reader.error);
    reader.readAsDataURL(file);
  });
}

// What people do.

element("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  send();
});
element("text").addEventListener("input", inputChanged);
element("text").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) element("ask").requestSubmit();
});
for (const id of ["beams", "longest"]) element(id).addEventListener("input", inputChanged);
element("stop").addEventListener("click", () => running?.abort());
element("copy").addEventListener("click", async () => {
  await navigator.clipboard.writeText(element("answer").innerText);
  answers.say("Copied.");
});
element("key-button").addEventListener("click", () => {
  element("key-words").textContent = key.get() ? "A key is in use." : "No key is in use.";
  showKeyPanel(element("key-panel").hidden);
  if (!element("key-panel").hidden) element("key").focus();
});
element("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  useKey(element("key").value.trim());
});
element("key-forget").addEventListener("click", () => useKey(""));
element("image").addEventListener("change", () => takeImage(element("image").files[0]));
document.addEventListener("paste", (event) => {
  const file = event.clipboardData?.files[0];
  if (file && model()?.inputs === "images") takeImage(file);
});
const drop = element("drop");
for (const [name, isOver] of [["dragover", true], ["dragleave", false], ["drop", false]]) {
  drop.addEventListener(name, (event) => {
    event.preventDefault();
    drop.classList.toggle("is-over", isOver);
    if (name === "drop") takeImage(event.dataTransfer.files[0]);
  });
}
document.addEventListener("visibilitychange", () => {
  if (document.hidden) clearTimeout(lookTimer);
  else look();
});
window.addEventListener("hashchange", () => {
  if (hashedName() && hashedName() !== chosen) choose(hashedName());
});

showKeyButton();
look();
