// How the page asks the server: the routes that any client asks, and the server's own words where it refuses.

const KEY_NAME = "eagleray-key";
const LOOK_TIMEOUT_MS = 15000;
const EVENTS = "text/event-stream";

// The key lives as long as the tab: in no address, no cookie and no other tab.
export const key = {
  get: () => sessionStorage.getItem(KEY_NAME) ?? "",
  set: (value) => sessionStorage.setItem(KEY_NAME, value),
  forget: () => sessionStorage.removeItem(KEY_NAME),
};

/** The server answered, and not what was asked for; `status` is null where only a part of its answer says so. */
export class Refusal extends Error {
  constructor(status, said, requestId, retryAfterS = null) {
    super(said.message);
    Object.assign(this, { status, code: said.code, hint: said.hint, requestId, retryAfterS });
  }
}

/** Nobody answered, or the answer broke off. */
export class Silence extends Error {}

/** Return what the server says of its models. */
export async function getModels() {
  const response = await reach("v1/models", {}, AbortSignal.timeout(LOOK_TIMEOUT_MS));
  await refuse(response);
  return (await read(response)).models;
}

/**
 * Ask a model; where the server sends the answer as it grows, `onPartial` is told each state of it.
 * Returns the whole answer, the id of the request, and the milliseconds to its first words and to its end.
 */
export async function ask(path, body, { signal, grows, onPartial }) {
  const began = performance.now();
  const headers = { "content-type": "application/json", accept: grows ? `${EVENTS}, application/json` : "application/json" };
  const response = await reach(path, { method: "POST", headers, body: JSON.stringify(body) }, signal);
  const requestId = response.headers.get("x-request-id");
  await refuse(response);
  let firstMs = null;
  const seen = (item) => {
    firstMs ??= performance.now() - began;
    onPartial(item);
  };
  const isStream = (response.headers.get("content-type") ?? "").startsWith(EVENTS);
  const answer = isStream ? await grown(response, requestId, seen, signal) : await read(response, signal);
  return { answer, requestId, firstMs, ms: performance.now() - began };
}

async function reach(path, options, signal) {
  const headers = { ...options.headers };
  if (key.get()) headers.authorization = `Bearer ${key.get()}`;
  try {
    return await fetch(path, { ...options, headers, signal, cache: "no-store", credentials: "omit", redirect: "error" });
  } catch (error) {
    throw broken(error, signal, "The server does not answer.");
  }
}

/** Throw the server's refusal, where it is one. */
async function refuse(response) {
  if (response.ok) return;
  const asJson = await response.json().catch(() => null);
  const said = asJson?.error ?? { code: "unknown", message: response.statusText || "the request failed", hint: null };
  const retryAfter = Number.parseInt(response.headers.get("retry-after") ?? "", 10);
  const requestId = response.headers.get("x-request-id");
  throw new Refusal(response.status, said, requestId, Number.isNaN(retryAfter) ? null : retryAfter);
}

async function read(response, signal) {
  try {
    return await response.json();
  } catch (error) {
    throw broken(error, signal, "The answer broke off.");
  }
}

/** Read events until the one that holds the whole answer. */
async function grown(response, requestId, onPartial, signal) {
  try {
    for await (const { name, data } of events(response.body)) {
      if (name === "done") return data;
      if (name === "error") throw new Refusal(null, data.error, requestId);
      onPartial(data);
    }
  } catch (error) {
    throw error instanceof Refusal ? error : broken(error, signal, "The answer broke off.");
  }
  throw new Silence("The answer broke off.");
}

async function* events(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      const blocks = (rest + value).split("\n\n");
      rest = blocks.pop();
      for (const block of blocks) yield event(block);
    }
  } finally {
    reader.cancel().catch(() => {}); // whoever has what was wanted lets go of the connection
  }
}

function event(block) {
  const found = { name: null, data: null };
  for (const line of block.split("\n")) {
    if (line.startsWith("event: ")) found.name = line.slice(7);
    if (line.startsWith("data: ")) found.data = JSON.parse(line.slice(6));
  }
  return found;
}

function broken(error, signal, words) {
  return signal?.aborted && signal.reason?.name !== "TimeoutError" ? error : new Silence(words);
}
