// The HTTP API of the server, with the key if it asks for one.

import { byId } from "./dom.js";

const KEY = "vidgen.key";
const TICKET_USE_MS = 1_800_000; // half of the hour that a ticket for reading one video lives

/** What the server refused and why, in its own words. */
export class ApiError extends Error {
  constructor(status, body, retryAfter) {
    const error = body?.error ?? {};
    super(error.message || `The server answered ${status}.`);
    this.status = status;
    this.code = error.code;
    this.param = error.param;
    this.retryAfter = retryAfter;
  }
}

let asking = null;
const tickets = new Map(); // by video

export const hasKey = () => Boolean(sessionStorage.getItem(KEY));
export const address = (path) => new URL(path, document.baseURI);

export function authorization() {
  const key = sessionStorage.getItem(KEY);
  return key ? { Authorization: `Bearer ${key}` } : {};
}

/** True once the person gave a key; one dialog for however many calls wait for it. */
function askKey() {
  asking ??= new Promise((resolve) => {
    const dialog = byId("key-dialog");
    const field = byId("key");
    byId("key-text").textContent = hasKey()
      ? "The server did not accept this key. Is it complete?"
      : "This server asks for a key. It is kept in this tab only.";
    const closed = () => {
      const key = field.value.trim();
      const isGiven = dialog.returnValue === "ok" && key !== "";
      if (isGiven) sessionStorage.setItem(KEY, key);
      field.value = "";
      asking = null;
      resolve(isGiven);
    };
    dialog.addEventListener("close", closed, { once: true });
    dialog.returnValue = "cancel";
    dialog.showModal();
    field.focus();
  });
  return asking;
}

async function send(method, path, { body, signal, headers } = {}) {
  const options = { method, signal, headers: { ...authorization(), ...headers } };
  if (body !== undefined) {
    options.body = JSON.stringify(body);
    options.headers["Content-Type"] = "application/json";
  }
  try {
    return await fetch(address(path), options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError(0, { error: { message: "The server does not answer. Is it still running?" } });
  }
}

/** The answer once it is a good one. `quiet` calls never open the key dialog. */
export async function request(method, path, options = {}) {
  const used = sessionStorage.getItem(KEY);
  const response = await send(method, path, options);
  if (response.ok) return response;
  if (response.status === 401 && !options.quiet) {
    // another call may have asked meanwhile
    const isNew = sessionStorage.getItem(KEY) !== used;
    if (isNew || (await askKey())) return request(method, path, options);
  }
  const text = await response.text();
  let body = null;
  try {
    body = JSON.parse(text);
  } catch {
    // an answer of a proxy in between: the status says enough
  }
  throw new ApiError(response.status, body, Number(response.headers.get("Retry-After")) || null);
}

export async function call(method, path, options) {
  return (await request(method, path, options)).json();
}

export const videos = {
  page: (after) => call("GET", `v1/videos?limit=20&order=desc${after ? `&after=${encodeURIComponent(after)}` : ""}`),
  get: (id) => call("GET", `v1/videos/${id}`),
  create: (body) => call("POST", "v1/videos", { body }),
  cancel: (id) => call("POST", `v1/videos/${id}/cancel`),
  resume: (id) => call("POST", `v1/videos/${id}/resume`),
  remove: (id) => call("DELETE", `v1/videos/${id}`),
};

/** Readiness with its facts, also from the 503 of a server that is still loading. */
export async function readiness() {
  const response = await send("GET", "ready");
  if (response.ok || response.status === 503) return response.json();
  throw new ApiError(response.status, null);
}

async function newTicket(body) {
  return (await call("POST", "v1/tickets", { body })).ticket;
}

/** An address of a video's media that elements can open: they send no headers, so a ticket stands in it. */
export async function mediaAddress(id, path) {
  const url = address(`v1/videos/${id}/${path}`);
  if (hasKey()) url.searchParams.set("ticket", await readingTicket(id));
  return url.href;
}

function readingTicket(id) {
  const known = tickets.get(id);
  if (known && Date.now() < known.until) return known.ticket;
  const ticket = newTicket({ video_id: id });
  tickets.set(id, { until: Date.now() + TICKET_USE_MS, ticket });
  ticket.catch(() => tickets.delete(id));
  return ticket;
}

export async function socketAddress() {
  const url = address("v1/realtime/video");
  url.protocol = url.protocol === "https:" ? "wss:" : "ws:";
  if (hasKey()) url.searchParams.set("ticket", await newTicket({}));
  return url.href;
}

/** Events of one video from its first, as {id, name, data}; ends when the server ends them. */
export async function* events(id, signal, after = "0") {
  const response = await request("GET", `v1/videos/${id}/events`, {
    signal,
    headers: { Accept: "text/event-stream", "Last-Event-ID": after },
  });
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const blocks = (rest + value.replaceAll("\r", "")).split("\n\n");
    rest = blocks.pop();
    for (const block of blocks) {
      const event = parseEvent(block);
      if (event) yield event;
    }
  }
}

function parseEvent(block) {
  const event = { id: null, name: "message", data: "" };
  for (const line of block.split("\n")) {
    const [, field, value] = /^(\w+): ?(.*)$/.exec(line) ?? [];
    if (field === "id") event.id = value;
    if (field === "event") event.name = value;
    if (field === "data") event.data += value;
  }
  return event.data ? { ...event, data: JSON.parse(event.data) } : null;
}

/** Saves a file through the browser's own download. */
export async function download(id, isPartial) {
  const link = document.createElement("a");
  link.href = await mediaAddress(id, `content${isPartial ? "?partial=true" : ""}`);
  link.download = `${id}.mp4`;
  document.body.append(link);
  link.click();
  link.remove();
}
