// What the server says of its models, on the page: the list to choose from, and the replicas of the chosen one.

const language = new Intl.DisplayNames(["en"], { type: "language", fallback: "code" });
const STATES = { ready: "is-ready", starting: "is-waiting", stopping: "is-waiting" };
const NUM_LABELS = 12;

export const element = (id) => document.getElementById(id);

/** Make an element: `make("p", { className: "small" }, "words", child)`. */
export function make(tag, properties = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

function dot() {
  const made = make("span", { className: "dot" });
  made.setAttribute("aria-hidden", "true");
  return made;
}

/** What a model does, in a word for its button. */
export const VERBS = { translate: "Translate", classify: "Classify", predict: "Predict" };
export const verb = (model) => model.path.split("/")[2];

export function languageName(code) {
  try {
    return language.of(code);
  } catch {
    return code; // none that the browser knows
  }
}

/** What a model does, in words. */
export function task(model) {
  if (model.source && model.target) return `${languageName(model.source)} to ${languageName(model.target)}`;
  if (verb(model) === "translate") return "Translates text";
  if (verb(model) === "predict") return "A task of its own";
  const what = model.inputs === "images" ? "images" : "text";
  return `Classifies ${what}${model.labels?.length ? `, ${model.labels.length} labels` : ""}`;
}

/** Show the models as radio buttons; one that is there already stays, so that the keyboard keeps its place. */
export function showModels(models, chosen, onChoose) {
  const list = element("models");
  const there = new Map([...list.querySelectorAll("label.model")].map((card) => [card.dataset.name, card]));
  for (const [name, card] of there) if (!models.some((model) => model.name === name)) card.remove();
  for (const model of models) {
    const card = there.get(model.name) ?? newCard(model, onChoose);
    if (!there.has(model.name)) list.append(card);
    card.querySelector("input").checked = model.name === chosen;
    card.classList.remove("is-ready", "is-waiting", "is-bad");
    card.classList.add(STATES[model.state] ?? "is-bad");
    write(card.querySelector(".model-state"), model.state);
    write(card.querySelector(".model-task"), task(model));
  }
  element("no-models").hidden = models.length > 0;
  element("no-models").textContent = models.length ? "" : "This server has no models.";
  list.setAttribute("aria-busy", "false");
}

function newCard(model, onChoose) {
  const choice = make("input", { type: "radio", name: "model", value: model.name });
  choice.addEventListener("change", () => onChoose(model.name));
  const head = make("span", { className: "model-name" }, dot(), model.name, make("span", { className: "model-state" }));
  const card = make("label", { className: "model" }, choice, head, make("span", { className: "model-task small" }));
  card.dataset.name = model.name;
  return card;
}

/** Show what is known of the chosen model. */
export function showAbout(model) {
  const shown = replicas(model).map(([className, words]) => {
    return make("li", { className }, ...(className ? [dot()] : []), words);
  });
  replaceWhereChanged(element("replicas"), shown);
  replaceWhereChanged(element("about-facts"), facts(model).map(([name, value, isWide]) => {
    const fact = make("div", { className: isWide ? "is-wide" : "" });
    fact.append(make("dt", {}, name), make("dd", {}, value));
    return fact;
  }));
  showKinds(Object.entries(model.scores ?? {}).filter(([name]) => name.includes("/")));
  element("about").hidden = false;
}

/** Show scores such as `chrf/date` as a table: a row for each kind, a column for each measure. */
function showKinds(scores) {
  const split = scores.map(([name, score]) => [name.slice(0, name.indexOf("/")), name.slice(name.indexOf("/") + 1), score]);
  const measures = [...new Set(split.map(([measure]) => measure))];
  const rows = new Map();
  for (const [measure, kind, score] of split) rows.set(kind, { ...rows.get(kind), [measure]: amount(score) });
  const head = make("tr", {}, ...["kind", ...measures].map((name) => make("th", { scope: "col" }, name)));
  const body = [...rows].map(([kind, found]) => {
    const cells = measures.map((measure) => make("td", {}, found[measure] ?? ""));
    return make("tr", {}, make("th", { scope: "row" }, kind), ...cells);
  });
  replaceWhereChanged(element("kinds-table"), [make("thead", {}, head), make("tbody", {}, ...body)]);
  element("kinds").hidden = !scores.length;
}

function replicas(model) {
  const counts = model.replicas;
  if (!counts) return [["is-waiting", "not told"]];
  const shown = [];
  if (counts.running) shown.push(["is-ready", `${counts.running} ready`]);
  if (counts.starting) shown.push(["is-waiting", `${counts.starting} starting`]);
  if (!shown.length) shown.push(["is-waiting", "none runs: the next request wakes one"]);
  if (counts.queued_tokens !== undefined) shown.push(["", `${amount(counts.queued_tokens)} tokens waiting`]);
  return shown;
}

function facts(model) {
  const rollout = model.rollout ?? {};
  const found = [["Version", model.version], ["State", model.state]];
  if (rollout.follow) found.push(["Follows", rollout.follow]);
  if (rollout.canary) found.push(["Canary", `${rollout.canary.version}, ${rollout.canary.percent}\u00a0%`]);
  if (rollout.loading) found.push(["Being loaded", rollout.loading.version]);
  for (const [name, score] of Object.entries(model.scores ?? {})) if (!name.includes("/")) found.push([name, amount(score)]);
  if (model.limits?.max_items) found.push(["Items in a request", `up to ${amount(model.limits.max_items)}`]);
  if (model.limits?.request_timeout_s) found.push(["Time limit", `${amount(model.limits.request_timeout_s)} s`]);
  const aim = model.replicas?.autoscaling?.target_replicas;
  if (aim !== undefined) found.push(["Autoscaling aims at", count(aim, "replica")]);
  for (const [version, figures] of Object.entries(rollout.requests ?? {})) {
    if (figures.requests) found.push([`Answered by ${version}`, figured(figures), true]);
  }
  if (model.labels?.length) found.push(["Labels", labels(model.labels), true]);
  if (rollout.refused) found.push(["Refused", `${rollout.refused.version}: ${rollout.refused.reason}`, true]);
  if (rollout.problem) found.push(["Problem", rollout.problem, true]);
  return found;
}

function figured({ requests, errors, p50_ms: half, p95_ms: most }) {
  const times = half === null ? "" : `; half of them within ${amount(half)} ms, 95 % within ${amount(most)} ms`;
  return `${count(requests, "request")}, ${count(errors, "error")}${times}`;
}

function labels(all) {
  const more = all.length - NUM_LABELS;
  return all.slice(0, NUM_LABELS).join(", ") + (more > 0 ? ` and ${more} more` : "");
}

export function amount(number) {
  return number.toLocaleString("en", { maximumFractionDigits: 4 });
}

/** Say how the server is, in one line. */
export function showServer(className, words) {
  element("server").className = className;
  write(element("server-words"), words);
}

export function serverWords(models) {
  const running = models.reduce((sum, model) => sum + (model.replicas?.running ?? 0), 0);
  const waiting = models.filter((model) => model.state !== "ready");
  const counted = `${count(models.length, "model")}, ${count(running, "replica")}`;
  return waiting.length ? `${counted}; not ready: ${waiting.map((model) => model.name).join(", ")}` : `${counted}, all ready`;
}

const count = (number, noun) => `${number} ${noun}${number === 1 ? "" : "s"}`;

// What is spoken aloud is spoken again whenever it is written: only a change is written.
function write(place, words) {
  if (place.textContent !== words) place.textContent = words;
}

function replaceWhereChanged(place, children) {
  if (place.textContent === children.map((child) => child.textContent).join("")) return;
  place.replaceChildren(...children);
}
