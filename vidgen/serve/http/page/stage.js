// The player's part of the page: its controls, and what they show of the video that is watched.

import { download } from "./api.js";
import { byId, complain, say, setText, settle } from "./dom.js";
import { Player } from "./player.js";
import { forget, ongoing, remembered } from "./records.js";
import { Report } from "./report.js";
import { TimeBar } from "./timebar.js";
import { Watching } from "./watching.js";

const DRAW_MS = 100;
const LEAD_IN_S = 0.3; // shown before a change that is jumped to
const FAR_S = 2; // from a change that is applied to what plays
const INVITATION = "Write a prompt and start.\nThe video appears here as it is made.";
const CANNOT_PLAY = "The browser cannot play this video. Try Download.";

export class Stage {
  #video = byId("video");
  #bar = new TimeBar((seconds) => this.#move(seconds));
  #player = new Player(this.#video, (name, detail) => this.#heardPlayer(name, detail));
  #report;
  #changed;
  #picture = null; // {afterOpen, afterStart} in ms, of the first frame
  watching = null;

  /** `changed()` is called when the list of videos is out of date. */
  constructor(facts, changed) {
    this.#report = new Report(facts);
    this.#changed = changed;
    this.#leave();
    byId("play").addEventListener("click", () => this.#toggle());
    byId("to-live").addEventListener("click", () => this.#toLive());
    byId("full").addEventListener("click", () => this.#fullScreen());
    byId("stop").addEventListener("click", () => this.watching?.stop());
    byId("close").addEventListener("click", () => this.leave());
    byId("save").addEventListener("click", () => this.#save());
    byId("change").addEventListener("submit", (event) => this.#change(event));
    this.#video.addEventListener("click", () => this.#toggle());
    this.#video.addEventListener("keydown", (event) => {
      if (event.key !== " ") return;
      event.preventDefault();
      this.#toggle();
    });
    for (const name of ["play", "playing", "pause", "ended"]) this.#video.addEventListener(name, () => this.#show());
    this.#video.addEventListener("loadeddata", () => this.#firstFrame());
    this.#video.addEventListener("error", () => this.watching?.mode === "file" && this.#complain(CANNOT_PLAY));
    setInterval(() => this.#draw(), DRAW_MS);
  }

  get id() {
    return this.watching?.id ?? null;
  }

  quality() {
    const quality = this.#video.getVideoPlaybackQuality();
    const { mode, chunks, skipped } = this.watching ?? {};
    const { state, stalls, stalledMs, jumps, reserveS, lag, rate, speed } = this.#player;
    return {
      mode,
      state,
      totalVideoFrames: quality.totalVideoFrames,
      droppedVideoFrames: quality.droppedVideoFrames,
      corruptedVideoFrames: quality.corruptedVideoFrames ?? 0,
      stalls,
      stalledMs: Math.round(stalledMs),
      jumps,
      chunks,
      skippedChunks: skipped,
      reserveS,
      lagS: lag,
      rate,
      speed,
      firstFrameMs: this.#picture?.afterOpen ?? null,
      startToFirstFrameMs: this.#picture?.afterStart ?? null,
    };
  }

  // ---- which video

  startLive(request) {
    this.#enter().start(request);
  }

  watch(record, prompts) {
    return this.#enter().watch(record, prompts).catch((error) => this.#complain(error.message));
  }

  update(record) {
    this.watching?.update(record);
  }

  leave() {
    if (this.id && this.id === remembered()) forget();
    this.#leave();
    byId("form").querySelector("textarea").focus();
    this.#changed();
  }

  #enter() {
    this.#leave();
    byId("screen").classList.remove("empty");
    const calm = matchMedia("(prefers-reduced-motion: reduce)").matches;
    const isBeside = matchMedia("(min-width: 900px)").matches; // and not under the form
    byId("stage").scrollIntoView({ block: isBeside ? "nearest" : "start", behavior: calm ? "auto" : "smooth" });
    this.watching = new Watching(this.#video, this.#player, this.#bar, (name, text) => this.#heard(name, text));
    return this.watching;
  }

  #leave() {
    this.watching?.close();
    this.watching = null;
    this.#picture = null;
    this.#bar.clear();
    byId("screen").className = "screen empty";
    for (const about of ["stage", "connection", "change", "note"]) settle(about);
    this.#overlay(INVITATION);
    this.#show();
  }

  // ---- what is heard

  #heard(name, text) {
    if (name === "busy" || name === "overlay") this.#overlay(this.#picture ? "" : text, name === "busy");
    else if (name === "complain") this.#complain(text);
    else if (["connection", "change", "note"].includes(name)) complain(text, name);
    else if (name === "settle") settle(text);
    else if (name === "list") this.#changed();
    this.#show();
  }

  #heardPlayer(name, detail) {
    if (name === "failed") this.#complain(detail);
    if (name === "stall") say("Playback waits for more frames");
    if (name === "jump") say("Back to the newest frames");
    this.#show();
  }

  #complain(text) {
    complain(text, "stage");
    if (!this.#picture) this.#overlay("Nothing to show.");
  }

  #firstFrame() {
    if (this.#picture || !this.watching) return;
    const { openedAt, startedAt } = this.watching;
    const now = performance.now();
    this.#picture = { afterOpen: now - openedAt, afterStart: startedAt === null ? null : now - startedAt };
    this.#overlay("");
    this.#show();
  }

  // ---- what the person does

  get #isPlaying() {
    return this.#player.isOpen ? this.#player.wantsPlay && this.#player.state !== "ended" : !this.#video.paused;
  }

  #toggle() {
    if (byId("play").disabled) return;
    if (!this.#player.isOpen) {
      if (this.#video.paused) this.#video.play().catch(() => {});
      else this.#video.pause();
    } else if (this.#isPlaying) {
      this.#player.pause();
    } else if (this.watching.isDone && this.#player.state === "ended") {
      this.watching.file();
    } else {
      this.#player.play();
    }
    this.#show();
  }

  #move(seconds) {
    if (!this.#player.isOpen) this.#video.currentTime = Math.max(0, Math.min(seconds, this.#video.duration || 0));
    else if (this.watching.isDone && seconds < (this.#player.ranges[0]?.[0] ?? 0)) this.watching.file(seconds);
    else this.#player.seek(seconds);
  }

  #toLive() {
    const { seekable } = this.#video;
    if (this.#player.isOpen) this.#player.toLive();
    else if (seekable.length) this.#video.currentTime = seekable.end(seekable.length - 1) - 1;
  }

  #fullScreen() {
    const screen = byId("screen");
    if (document.fullscreenElement) document.exitFullscreen();
    else if (screen.requestFullscreen) screen.requestFullscreen();
    else this.#video.webkitEnterFullscreen?.(); // phones of Apple
  }

  async #save() {
    try {
      await download(this.id, this.watching.record.status !== "completed");
    } catch (error) {
      this.#complain(error.message);
    }
  }

  #change(event) {
    event.preventDefault();
    const field = byId("change-prompt");
    const prompt = field.value.trim();
    if (prompt && !this.watching.change(prompt, Number(byId("change-over").value))) {
      complain("There is no connection just now; try again in a moment.", "change");
      return;
    }
    if (prompt) {
      settle("change");
      say("Change sent");
      field.value = "";
    }
    field.focus();
  }

  // ---- what is shown

  #overlay(text, isBusy = false) {
    byId("overlay").hidden = !text;
    byId("overlay").classList.toggle("busy", isBusy);
    if (text) setText(byId("overlay-text"), text);
  }

  /** Which controls there are; called when something has happened. */
  #show() {
    const { watching } = this;
    const record = watching?.record ?? null;
    const isOn = Boolean(record) && ongoing(record) && !watching.isDone;
    byId("stop").hidden = !isOn;
    byId("stop").disabled = Boolean(watching?.isStopping);
    setText(byId("stop"), watching?.isStopping ? "Stopping…" : watching?.isSession ? "Stop" : "Cancel");
    byId("save").hidden = !record || !(record.status === "completed" || record.frames_done > 0);
    setText(byId("save"), record?.status === "completed" ? "Download" : "Download what is there");
    byId("close").hidden = !watching;
    byId("change").hidden = !(isOn && watching.isSession && watching.mode !== "file");
    byId("play").disabled = byId("full").disabled = !this.#picture;
    byId("play").classList.toggle("is-playing", this.#isPlaying);
    byId("play").setAttribute("aria-label", this.#isPlaying ? "Pause" : "Play");
    byId("screen").classList.toggle("waits", Boolean(this.#picture) && this.#player.isOpen && this.#player.state === "buffering");
    byId("to-live").hidden = !(isOn && this.#picture && watching.isSession);
  }

  /** Times and places; ten times a second. */
  #draw() {
    const { watching } = this;
    this.#report.draw(watching, this.#player, this.#picture !== null);
    if (!watching) return;
    const { record, fps } = watching;
    const isOpenEnded = watching.isSession && !watching.isDone;
    const length = watching.isSession ? watching.made : (record?.num_frames ?? 0) / (fps || 1);
    const ranges = Array.from({ length: this.#video.buffered.length }, (_, i) => [this.#video.buffered.start(i), this.#video.buffered.end(i)]);
    this.#bar.update({ current: this.#video.currentTime, made: watching.made, ranges, total: isOpenEnded ? 0 : length });
    this.#jumpToChange();
  }

  /** A change is there and far ahead of what plays, because the generator outran the clock: show it now. */
  #jumpToChange() {
    const { jumpTo } = this.watching;
    if (jumpTo === null || this.#player.end_s <= jumpTo) return;
    this.watching.jumpTo = null;
    const isFar = jumpTo - this.#video.currentTime > FAR_S;
    if (!isFar || !this.#player.isFollowing || !this.#player.outruns) return;
    this.#player.seek(jumpTo - LEAD_IN_S);
    this.#player.isFollowing = true;
    this.#player.jumps += 1;
    say("Moved ahead to the change");
  }
}
