// The socket of a live session, or of anything that is watched while it is made.

import { socketAddress } from "./api.js";

const RETRY_MS = [300, 1000, 2000, 4000, 8000];
const PING_MS = 10_000;

/** `hear(name, message, bytes)` gets every message of the server under its type, and `lost` when it is gone. */
export class LiveSocket {
  #hear;
  #socket = null;
  #awaited = null;
  #tries = 0;
  #isOver = false;
  #ping = null;
  #count = 0;

  constructor(hear) {
    this.#hear = hear;
    this.id = null;
    this.lastSeq = -1;
    this.policy = "drop";
  }

  start(request) {
    this.policy = request.policy ?? this.policy;
    return this.#connect({ type: "session.start", ...request });
  }

  resume(id, lastSeq = -1) {
    this.id = id;
    if (typeof lastSeq === "number") this.lastSeq = lastSeq;
    return this.#connect({ type: "session.resume", session_id: id, last_seq: lastSeq, policy: this.policy });
  }

  /** The name under which `session.interaction.applied` will speak of this change. */
  change(prompt, transitionChunks) {
    this.#count += 1;
    const id = `change-${Date.now().toString(36)}${Math.random().toString(36).slice(2, 8)}-${this.#count}`;
    this.#send({
      type: "session.interaction",
      event_id: id,
      event: { prompt },
      transition_chunks: transitionChunks,
    });
    return id;
  }

  stop() {
    this.#send({ type: "session.stop" });
  }

  get isConnected() {
    return this.#socket?.readyState === WebSocket.OPEN;
  }

  close() {
    this.#isOver = true;
    clearInterval(this.#ping);
    this.#socket?.close();
  }

  #send(message) {
    if (this.isConnected) this.#socket.send(JSON.stringify(message));
  }

  async #connect(first) {
    let url;
    try {
      url = await socketAddress();
    } catch (error) {
      this.#giveUp(error.message);
      return;
    }
    if (this.#isOver) return;
    const socket = new WebSocket(url);
    this.#socket = socket;
    this.#awaited = null;
    socket.binaryType = "arraybuffer";
    socket.addEventListener("open", () => {
      this.#send(first);
      clearInterval(this.#ping);
      this.#ping = setInterval(() => this.#send({ type: "session.ping", nonce: String(Date.now()) }), PING_MS);
    });
    socket.addEventListener("message", ({ data }) => this.#take(data));
    socket.addEventListener("close", ({ reason }) => socket === this.#socket && this.#closed(reason));
  }

  #take(data) {
    if (data instanceof ArrayBuffer) {
      const message = this.#awaited;
      this.#awaited = null;
      if (message) this.#hear(message.type, message, data);
      return;
    }
    const message = JSON.parse(data);
    if (message.type === "video.start") {
      this.id = message.session_id;
      this.#awaited = message;
    } else if (message.type === "video.chunk_metadata") {
      this.lastSeq = message.seq;
      this.#tries = 0;
      this.#awaited = message;
    } else {
      if (message.type === "session.done") this.#isOver = true;
      this.#hear(message.type, message);
    }
  }

  #closed(reason) {
    clearInterval(this.#ping);
    if (this.#isOver) return;
    if (this.id && this.#tries < RETRY_MS.length) {
      this.#hear("reconnecting", { attempt: this.#tries + 1 });
      setTimeout(() => !this.#isOver && this.resume(this.id, this.lastSeq), RETRY_MS[this.#tries]);
      this.#tries += 1;
    } else {
      this.#giveUp(reason);
    }
  }

  #giveUp(reason) {
    this.#isOver = true;
    this.#hear("lost", { reason: reason || "" });
  }
}
