// The way to the server: the key, JSON, server-sent events, and the server's own words when something is wrong.

const KEY_NAME = "exo-kimi.key";

/** What the server refused, in its words. */
export class ApiError extends Error {
  constructor(status, message, code) {
    super(message);
    this.status = status;
    this.code = code;
  }
}

/** The connection was lost: there was no answer, or it broke off. */
export class LostError extends Error {}

let askForKey = async () => null;

/** `ask(wrong)` shows the question for the key and resolves with it. */
export function onKeyNeeded(ask) {
  askForKey = ask;
}

export function storedKey() {
  return localStorage.getItem(KEY_NAME);
}

export function forgetKey() {
  localStorage.removeItem(KEY_NAME);
}

let asking = null;

async function fetchWithKey(path, { method = "GET", body, signal } = {}) {
  for (;;) {
    const key = storedKey();
    const headers = {};
    if (key !== null) headers.authorization = `Bearer ${key}`;
    if (body !== undefined) headers["content-type"] = "application/json";
    let response;
    try {
      response = await fetch(path, { method, headers, signal, body: body === undefined ? undefined : JSON.stringify(body) });
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new LostError(error.message);
    }
    if (response.status !== 401) return response;
    if (storedKey() !== key) continue; // another request has asked meanwhile
    asking ??= askForKey(key !== null).finally(() => (asking = null));
    const given = await asking;
    if (given === null) throw await refusal(response);
    localStorage.setItem(KEY_NAME, given);
  }
}

async function refusal(response) {
  const text = await response.text();
  try {
    const { error } = JSON.parse(text);
    return new ApiError(response.status, error.message, error.code);
  } catch {
    return new ApiError(response.status, text.slice(0, 300) || response.statusText, null);
  }
}

/** The JSON of an answer; throws ApiError or LostError. */
export async function json(path, options) {
  const response = await fetchWithKey(path, options);
  if (!response.ok) throw await refusal(response);
  return await response.json();
}

/** Every event of a stream, as `onEvent(data, name)`; resolves when the stream ends. */
export async function events(path, options, onEvent) {
  const response = await fetchWithKey(path, options);
  if (!response.ok) throw await refusal(response);
  const reader = response.body.getReader();
  const decoder = new TextDecoder();
  let rest = "";
  let name = "message";
  let data = [];
  const line = (text) => {
    if (text === "") {
      if (data.length > 0) onEvent(data.join("\n"), name);
      name = "message";
      data = [];
    } else if (text.startsWith("data:")) data.push(text.slice(text[5] === " " ? 6 : 5));
    else if (text.startsWith("event:")) name = text.slice(6).trim();
  };
  for (;;) {
    let part;
    try {
      part = await reader.read();
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new LostError(error.message);
    }
    if (part.done) return;
    rest += decoder.decode(part.value, { stream: true });
    const lines = rest.split(/\r\n|\n|\r(?!$)/);
    rest = lines.pop();
    lines.forEach(line);
  }
}
