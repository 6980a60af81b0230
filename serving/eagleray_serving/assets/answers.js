// What came back, on the page: a translation as it grows, scores as bars, JSON as it is, and what went wrong.

import { amount, element, make } from "./models.js";
import { Refusal } from "./wire.js";

const NUM_BARS = 8;
let countdown = null;

/** Make room for an answer that is on its way. */
export function begin() {
  clearProblem();
  element("facts").hidden = true;
  element("copy").hidden = true;
  const answer = element("answer");
  answer.replaceChildren();
  answer.classList.remove("is-empty");
  answer.removeAttribute("lang");
  answer.setAttribute("aria-busy", "true");
  say("");
}

/** No answer is on its way any more. */
export function end() {
  element("answer").setAttribute("aria-busy", "false");
}

/** There is no answer; say why. */
export function showNone(words) {
  element("answer").classList.add("is-empty");
  element("answer").textContent = words;
}

export function clear() {
  begin();
  end();
  showNone("The answer will stand here.");
}

export function say(words) {
  element("phase").textContent = words;
}

/** Show a translation, or as much of it as is known. */
export function showText(text, language) {
  const answer = element("answer");
  answer.textContent = text;
  answer.dir = "auto";
  if (language) answer.lang = language;
}

/** Show an answer of any kind. */
export function showAnswer(model, { answer, requestId }) {
  const [item] = answer.translations ?? answer.predictions;
  if (item?.error) throw new Refusal(null, item.error, requestId);
  if (answer.translations) showText(item.text, model.target);
  else if (item?.scores) showBars(item.scores);
  else element("answer").replaceChildren(make("pre", {}, JSON.stringify(item, null, 2)));
  element("copy").hidden = !navigator.clipboard;
}

function showBars(scores) {
  const sorted = Object.entries(scores).sort((one, other) => other[1] - one[1]);
  const bars = make("ol", { className: "bars" }, ...sorted.slice(0, NUM_BARS).map(bar));
  element("answer").replaceChildren(bars);
  if (sorted.length <= NUM_BARS) return;
  const more = make("button", { type: "button", className: "quiet bars-more" }, `All ${sorted.length} labels`);
  more.addEventListener("click", () => {
    bars.append(...sorted.slice(NUM_BARS).map(bar));
    more.remove();
  });
  element("answer").append(more);
}

function bar([label, score]) {
  const fill = make("div", { className: "bar-fill" });
  fill.style.width = `${Math.max(0, Math.min(1, score)) * 100}%`;
  const track = make("div", { className: "bar-track" }, fill);
  track.setAttribute("aria-hidden", "true");
  const percent = make("span", { className: "bar-score" }, `${(score * 100).toFixed(1)} %`);
  return make("li", {}, make("div", { className: "bar-words" }, make("span", {}, label), percent), track);
}

export function showFacts(version, { ms, firstMs, requestId }) {
  element("fact-version").textContent = version;
  const first = firstMs === null ? "" : `, first words after ${amount(Math.round(firstMs))} ms`;
  element("fact-time").textContent = `${amount(Math.round(ms))} ms${first}`;
  element("fact-request").textContent = requestId ?? "not told";
  element("facts").hidden = false;
}

/** Say what went wrong; after a while that the server names, or at once, it can be tried again. */
export function showProblem(error, onAgain) {
  clearProblem();
  const isRefusal = error instanceof Refusal;
  element("problem-message").textContent = error.message;
  element("problem-hint").textContent = isRefusal ? (error.hint ?? "") : "It may be starting again. The page keeps looking for it.";
  const code = [error.status, error.code].filter(Boolean).join(" ");
  element("problem-code").textContent = [code, error.requestId && `request ${error.requestId}`].filter(Boolean).join(", ");
  element("problem").hidden = false;
  offerAgain(isRefusal ? error.retryAfterS : 0, onAgain);
}

export function clearProblem() {
  clearInterval(countdown);
  element("problem").hidden = true;
  element("again").hidden = true;
}

function offerAgain(waitS, onAgain) {
  if (waitS === null) return;
  const again = element("again");
  const until = performance.now() + waitS * 1000;
  const tick = () => {
    const left = Math.ceil((until - performance.now()) / 1000);
    again.disabled = left > 0;
    again.textContent = left > 0 ? `Try again in ${left} s` : "Try again";
    if (left <= 0) clearInterval(countdown);
  };
  again.onclick = onAgain;
  again.hidden = false;
  countdown = setInterval(tick, 250);
  tick();
}
