// One video while it is shown: where its frames come from, what the server says of it, what is known of it.

import { ApiError, mediaAddress, videos } from "./api.js";
import { hearEvents, playHls } from "./fallback.js";
import { clock, say } from "./dom.js";
import { LiveSocket } from "./live.js";
import { Player } from "./player.js";
import { forget, merged, ongoing, promptOf, queueWords, remember, rememberPrompt, remembered } from "./records.js";

const PLANNED = "planned-"; // marks of the prompts that a video begins with
const POLL_MS = 700;
const PROGRESS = ["frames_done", "eta_s", "chunks_done", "chunks_total"];

/** `tell(name, text)` hears of: overlay, busy, complain, connection, change, note, settle, list, show. */
export class Watching {
  #video;
  #player;
  #bar;
  #tell;
  #socket = null;
  #hls = null;
  #listening = new AbortController();
  #isMarked = false;
  #asked = new Set(); // changes of this page that are not applied yet

  record = null;
  mode = null; // socket, hls or file
  isSession = false;
  isDone = false;
  isStopping = false;
  isClosed = false;
  prompts = []; // [{prompt, num_frames}] that it begins with
  fps = 0;
  made = 0; // seconds
  chunks = 0;
  skipped = 0;
  jumpTo = null; // seconds of a change that is to be seen at once
  chunkEveryS = null;
  newsAt = null; // when the newest chunk came
  openedAt = performance.now();
  startedAt = null;

  constructor(video, player, bar, tell) {
    this.#video = video;
    this.#player = player;
    this.#bar = bar;
    this.#tell = tell;
  }

  get id() {
    return this.record?.id ?? null;
  }

  /** Begins a session. `request` is the form's. */
  start(request) {
    this.#tell("busy", "Starting…");
    say("Starting a live session");
    this.isSession = true;
    this.prompts = request.segments ?? [{ prompt: request.prompt, num_frames: 0 }];
    this.#connect().start(request);
  }

  #connect() {
    this.mode = "socket";
    return (this.#socket = new LiveSocket((...heard) => this.#hear(...heard)));
  }

  /** Shows any video in the way that fits its state; `prompts` as of a request, where they are known. */
  async watch(record, prompts) {
    this.#tell("busy", "Opening…");
    this.record = record;
    this.fps = record.fps;
    this.isSession = record.kind === "session";
    this.prompts = prompts ?? [{ prompt: record.prompt, num_frames: 0 }];
    this.#markPrompts();
    if (!ongoing(record)) {
      this.isDone = true;
      hearEvents(this.id, this.#listening.signal, (...heard) => this.#hear(...heard));
      await this.file();
    } else if (new URLSearchParams(location.search).get("player") === "hls") {
      await this.#useHls();
    } else {
      if (this.isSession) remember(record.id);
      this.#connect().resume(record.id, -1);
    }
  }

  /** From the file, which has also what the live player let go of. */
  async file(seconds = 0) {
    const { id, status, frames_done } = this.record;
    const isPartial = status !== "completed";
    this.#player.close();
    if (isPartial && !frames_done) {
      this.#tell("overlay", "There are no frames of this video.");
      return;
    }
    this.mode = "file";
    const address = await mediaAddress(id, `content${isPartial ? "?partial=true" : ""}`);
    if (this.isClosed) return;
    this.made = frames_done / this.fps;
    this.#video.src = address;
    this.#video.currentTime = seconds;
    this.#video.play().catch(() => {});
  }

  async #useHls() {
    if (this.mode === "hls" || !this.id) return;
    this.mode = "hls";
    this.#player.close();
    hearEvents(this.id, this.#listening.signal, (...heard) => this.#hear(...heard));
    while (!this.isClosed && ongoing(this.record) && !this.record.chunks_done) await this.#refresh(POLL_MS); // no playlist yet
    if (this.isClosed) return;
    const hls = await playHls(this.#video, this.id, (text) => this.#tell("complain", text));
    if (this.isClosed) hls.close();
    else this.#hls = hls;
  }

  close() {
    this.isClosed = true;
    this.#listening.abort();
    this.#socket?.close();
    this.#hls?.close();
    this.#player.close();
    this.#video.removeAttribute("src");
    this.#video.load();
  }

  /** Ends the session, or cancels the job. */
  async stop() {
    this.isStopping = true;
    say("Stopping");
    if (this.isSession && this.#socket?.isConnected) this.#socket.stop();
    else await videos.cancel(this.id).catch((error) => this.#tell("complain", error.message));
    this.#tell("list");
  }

  /** Asks for another prompt; false while there is no connection. */
  change(prompt, over) {
    if (!this.#socket?.isConnected) return false;
    const id = this.#socket.change(prompt, over);
    this.#asked.add(id);
    rememberPrompt(id, prompt);
    this.#bar.mark(id, { prompt, over });
    return true;
  }

  #hear(type, message, bytes) {
    const name = type.replace(/^(session|video|queue)\./, "").replace(".", "_");
    this[`_${name}`]?.(message, bytes);
    this.#tell("show");
  }

  _status({ session_id, position }) {
    this.#queuedAs(session_id, position);
    this.#tell("busy", queueWords(position));
    say(queueWords(position));
  }

  /** It has its name before its first frame, so that it can be stopped while it waits. */
  #queuedAs(id, position) {
    if (!id || !this.isSession) return;
    this.record = { ...(this.record ?? { id, kind: "session", prompt: this.prompts[0].prompt }), status: "queued", queue_position: position };
    remember(id);
  }

  async _start(message, init) {
    this.startedAt ??= performance.now();
    this.fps = message.fps;
    this.#tell("settle", "connection");
    if (!this.#isMarked) this.#adopt(message);
    if (this.mode !== "socket") return;
    if (!Player.plays(message.mime)) {
      await this.#useHls();
      return;
    }
    if (this.#player.isOpen) return this.#player.append(init);
    this.#tell("busy", "Loading…");
    const opened = this.#player.open(message.mime, { isLive: this.isSession });
    this.#player.append(init);
    await opened;
  }

  /** A session that began here gets its name. */
  #adopt(message) {
    const { session_id: id, fps, num_frames } = message;
    const known = this.record ?? { id, kind: "session", prompt: this.prompts[0].prompt };
    this.record = { ...known, status: "in_progress", fps, num_frames };
    remember(id);
    this.#markPrompts();
    this.#tell("list");
  }

  #markPrompts() {
    this.#isMarked = true;
    let frame = 0;
    this.prompts.forEach(({ prompt, num_frames: length }, index) => {
      this.#bar.mark(`${PLANNED}${index}`, { prompt, seconds: frame / this.fps });
      frame += length;
    });
  }

  _chunk_metadata(message, bytes) {
    const now = performance.now();
    if (this.newsAt !== null) {
      const took = (now - this.newsAt) / 1000;
      this.chunkEveryS = 0.7 * (this.chunkEveryS ?? took) + 0.3 * took;
    }
    this.newsAt = now;
    this.chunks += 1;
    this.made = Math.max(this.made, message.pts + message.duration_s);
    if (this.mode === "socket") this.#player.append(bytes, message.duration_s);
    this.#advance({ frames_done: message.first_frame + message.num_frames, chunks_done: message.seq + 1 });
  }

  _dropped({ from_seq, to_seq }) {
    this.skipped += to_seq - from_seq + 1;
  }

  _interaction_applied({ event_id, frame, prompt }) {
    const seconds = frame / this.fps;
    this.#bar.mark(event_id, { seconds, prompt: prompt ?? promptOf(event_id) ?? "changed elsewhere" });
    this.#bar.supersede(seconds, PLANNED);
    if (!this.#asked.delete(event_id)) return;
    say(`The change is applied at ${clock(seconds)}`);
    if (this.#player.isFollowing && this.isSession) this.jumpTo = seconds;
  }

  _interaction_refused({ event_id, message }) {
    this.#asked.delete(event_id);
    this.#bar.mark(event_id, { refused: message });
    this.#tell("change", message);
  }

  _progress(message) {
    if (this.isDone) return;
    const told = PROGRESS.filter((name) => message[name] !== undefined).map((name) => [name, message[name]]);
    this.#advance({ ...Object.fromEntries(told), status: "in_progress" });
    if (!this.chunks && this.mode === "socket") this.#tell("busy", "The first frames are being made…");
  }

  #advance(told) {
    if (this.record) this.record = merged(this.record, told);
  }

  _note({ message }) {
    this.#tell("note", message);
  }

  _reconnecting({ attempt }) {
    this.#tell("connection", `The connection was lost; trying again (${attempt}).`);
  }

  _lost({ reason }) {
    this.#tell("settle", "connection");
    if (this.isDone) return;
    if (this.id) {
      this.#tell("note", "The live connection cannot be opened; the video is loaded in larger pieces instead.");
      this.#useHls();
    } else {
      this.#tell("complain", `The session could not start${reason ? `: ${reason}` : ""}. The server may be down; Render works without a live connection.`);
    }
  }

  _error({ message, event_id, code }) {
    if (event_id) return this._interaction_refused({ event_id, message });
    this.#tell("complain", message ?? code);
  }

  async _done({ status }) {
    this.isDone = true;
    if (this.id === remembered()) forget();
    this.#player.end();
    this.#bar.forgetWaiting();
    await this.#refresh();
    if (status === "failed" || this.record?.status === "failed") this.#tellFailure();
    else say("The video is done");
    this.#tell("list");
  }

  #tellFailure() {
    const error = this.record?.error;
    if (error?.code === "cancelled" || this.isStopping) say("Cancelled");
    else this.#tell("complain", error?.message ?? "The video failed.");
    this.#tell("overlay", error?.code === "cancelled" ? "Cancelled." : "Failed.");
  }

  async #refresh(after_ms = 0) {
    await new Promise((resolve) => setTimeout(resolve, after_ms));
    try {
      this.update(await videos.get(this.id));
    } catch (error) {
      if (error instanceof ApiError && error.status === 404) this.#tell("complain", "This video is deleted.");
    }
  }

  /** Newer facts about the video that is shown. */
  update(record) {
    if (record.id !== this.id || this.isClosed) return;
    this.#advance(record);
    if (!ongoing(record) && !this.isDone && this.mode === "hls") this._done({ status: record.status });
    this.#tell("show");
  }
}
