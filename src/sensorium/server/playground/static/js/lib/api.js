// Calls of the server. Every failure becomes an ApiError, whose message is a sentence for people.

import { EventReader } from "./sse.js";

/** Address that all paths of the server begin with: this file is /playground/DIGEST/js/lib/api.js. */
export const ROOT = new URL("../../../../", import.meta.url);

const KEY = "sensorium.key";

export class ApiError extends Error {
  constructor(message, { status = 0, code = "", param = null, retryAfter = null } = {}) {
    super(message);
    Object.assign(this, { status, code, param, retryAfter });
  }
}

const session = () => sessionStorage; // where site data are blocked, the name alone throws
const local = () => localStorage;
let unkept = ""; // the key where no storage takes it: as long as the page

function kept(storage) {
  try {
    return storage().getItem(KEY) ?? "";
  } catch {
    return "";
  }
}

/** Keep the key in a storage, or remove it with ""; return false where that is not allowed. */
function keep(storage, value) {
  try {
    if (value) storage().setItem(KEY, value);
    else storage().removeItem(KEY);
    return true;
  } catch {
    return false;
  }
}

/** The API key. It lives in the tab's session unless people ask to keep it. */
export const key = {
  get: () => unkept || kept(session) || kept(local),
  isKept: () => kept(local) !== "",
  set(value, isToStay) {
    for (const storage of [session, local]) keep(storage, "");
    unkept = keep(isToStay ? local : session, value) ? "" : value;
  },
};

export function address(path) {
  return new URL(path, ROOT).href;
}

async function request(path, options = {}) {
  const headers = { ...options.headers };
  if (key.get()) headers.authorization = `Bearer ${key.get()}`;
  let response;
  try {
    response = await fetch(address(path), { ...options, headers, credentials: "same-origin", redirect: "error" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    if (/header/i.test(error.message)) throw new ApiError("The API key has characters that a header cannot hold.");
    throw new ApiError("The server cannot be reached. Is it running?", { code: "unreachable" });
  }
  if (!response.ok) throw await failure(response);
  return response;
}

async function failure(response) {
  let error = {};
  try {
    error = (await response.json()).error ?? {};
  } catch {
    // No JSON: a proxy has answered.
  }
  const message = typeof error.message === "string" ? error.message : `The server answered with status ${response.status}.`;
  return new ApiError(message, {
    status: response.status,
    code: error.code ?? "",
    param: error.param ?? null,
    retryAfter: Number(response.headers.get("retry-after")) || null,
  });
}

export async function getJson(path) {
  return (await request(path)).json();
}

export async function getText(path) {
  return (await request(path)).text();
}

export async function postJson(path, body, signal) {
  const options = { method: "POST", body: JSON.stringify(body), headers: { "content-type": "application/json" }, signal };
  return (await request(path, options)).json();
}

/** Yield the chunks of a streamed answer. Aborting `signal` ends it with an AbortError. */
export async function* stream(path, body, signal) {
  const response = await request(path, {
    method: "POST",
    body: JSON.stringify(body),
    headers: { "content-type": "application/json" },
    signal,
  });
  const events = new EventReader();
  const reader = response.body.getReader();
  try {
    for (;;) {
      const { done, value } = await reader.read().catch((error) => {
        if (error.name === "AbortError") throw error;
        throw new ApiError("The connection broke before the answer was complete.", { code: "unreachable" });
      });
      for (const data of done ? events.end() : events.feed(value)) {
        if (data === "[DONE]") return;
        const chunk = JSON.parse(data);
        if (chunk.error) throw new ApiError(chunk.error.message, { code: chunk.error.code, param: chunk.error.param });
        yield chunk;
      }
      if (done) throw new ApiError("The connection ended before the answer was complete.", { code: "unreachable" });
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}
