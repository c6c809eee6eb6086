// Plays fragments of an MP4 as they arrive, by Media Source Extensions.
//
// It starts with a reserve, waits for a larger one after every stall, keeps a minute of the past, and returns to the
// newest frames when watching fell behind. Where frames are made more slowly than they play, it plays as fast as they
// are made: slow motion is easier to watch than a picture that stops and goes.

const FIRST_RESERVE_S = 1; // 0.5 s stalled three times in 96 frames, 1 s never (headless Chromium 156)
const MOST_RESERVE_S = 6;
const KEEP_S = 60;
const TRIM_STEP_S = 10; // not a removal for every frame
const LAG_S = 2;
const EDGE_S = 0.05; // frames end a little before the range that holds them
const TICK_MS = 100;
const SLOWEST = 0.25;
const TAIL_S = 4;
const LEVEL_SHARE = TICK_MS / 2000; // the reserve is averaged over two seconds
const SPEED_STEP = 0.05; // faster, for each tick
const KEPT_ARRIVALS = 8;
const OUTRUNS = 1.15; // made so much faster than it plays

const Source = window.ManagedMediaSource ?? window.MediaSource;

export class Player {
  #video;
  #tell;
  #source = null;
  #buffer = null;
  #queue = [];
  #arrivals = [];
  #timer = null;
  #isEnded = false;
  #level = FIRST_RESERVE_S; // of the reserve, on average
  #address = null;

  /** `tell(name, detail)` hears of: state, stall, jump, failed. */
  constructor(video, tell) {
    this.#video = video;
    this.#tell = tell;
    this.reset();
    const react = (name, act) => video.addEventListener(name, () => this.#source && act());
    react("playing", () => this.#set("playing"));
    react("ended", () => this.#set("ended"));
    react("timeupdate", () => this.#pump());
    react("waiting", () => this.#waits());
  }

  static plays(mime) {
    return Boolean(Source?.isTypeSupported(mime));
  }

  reset() {
    this.state = "idle";
    this.wantsPlay = true;
    this.isLive = false;
    this.isFollowing = true;
    this.hasStarted = false;
    this.reserveS = FIRST_RESERVE_S;
    this.chunkS = 0;
    this.stalls = 0;
    this.stalledMs = 0;
    this.jumps = 0;
    this.stallStart = null;
  }

  async open(mime, { isLive }) {
    this.close();
    this.isLive = isLive;
    const source = new Source();
    this.#source = source;
    this.#video.disableRemotePlayback = true; // ManagedMediaSource opens only then
    this.#address = URL.createObjectURL(source);
    this.#video.src = this.#address;
    this.#timer = setInterval(() => this.#tick(), TICK_MS);
    this.#set("buffering");
    await new Promise((resolve) => source.addEventListener("sourceopen", resolve, { once: true }));
    if (this.#source !== source) return;
    this.#buffer = source.addSourceBuffer(mime);
    this.#buffer.addEventListener("updateend", () => this.#pump());
    this.#buffer.addEventListener("error", () => this.#fail("The browser could not read a piece of the video."));
    this.#pump();
  }

  /** Takes an init segment or a fragment; `seconds` is the fragment's length. */
  append(bytes, seconds = 0) {
    if (seconds) {
      this.chunkS = seconds;
      this.#arrivals.push({ at: performance.now(), seconds });
      if (this.#arrivals.length > KEPT_ARRIVALS) this.#arrivals.shift();
    }
    this.#queue.push(bytes);
    this.#pump();
  }

  /** Nothing follows. */
  end() {
    this.#isEnded = true;
    this.#pump();
  }

  close() {
    clearInterval(this.#timer);
    this.#source = this.#buffer = this.#timer = null;
    this.#queue = [];
    this.#arrivals = [];
    this.#isEnded = false;
    if (this.#address) {
      URL.revokeObjectURL(this.#address);
      this.#video.removeAttribute("src");
      this.#video.load();
    }
    this.#address = null;
    this.#video.playbackRate = 1;
    this.reset();
  }

  get isOpen() {
    return this.#source !== null;
  }

  /** Seconds of video that come in a second, by the newest chunks; null before there are two. */
  get rate() {
    if (this.#arrivals.length < 2) return null;
    const [first, ...later] = this.#arrivals;
    const span = later.at(-1).at - first.at;
    const overdue = performance.now() - later.at(-1).at - span / later.length;
    const took = span + (this.#isEnded ? 0 : Math.max(0, overdue));
    return later.reduce((sum, one) => sum + one.seconds, 0) / Math.max(took / 1000, 0.001);
  }

  get ranges() {
    const { buffered } = this.#video;
    return Array.from({ length: buffered.length }, (_, i) => [buffered.start(i), buffered.end(i)]);
  }

  get end_s() {
    return this.ranges.at(-1)?.[1] ?? 0;
  }

  get lag() {
    return Math.max(0, this.end_s - this.#video.currentTime);
  }

  /** Whether frames are made faster than they play. */
  get outruns() {
    return this.rate !== null && this.rate > OUTRUNS;
  }

  get speed() {
    return this.#video.playbackRate;
  }

  get #ahead() {
    const now = this.#video.currentTime;
    const range = this.ranges.find(([start, end]) => start - EDGE_S <= now && now < end);
    return range ? range[1] - now : 0;
  }

  play() {
    this.wantsPlay = true;
    if (this.state === "ended") this.seek(this.ranges[0]?.[0] ?? 0);
    this.#set("buffering");
    this.#tick();
  }

  pause() {
    this.wantsPlay = false;
    this.isFollowing = false;
    this.#video.pause();
    this.#set("paused");
  }

  /** Moves within what is here. Away from the newest frames, nothing pulls back to them. */
  seek(seconds) {
    const ranges = this.ranges;
    if (!ranges.length) return;
    this.isFollowing = seconds >= this.end_s - Math.max(LAG_S, this.reserveS);
    this.#video.currentTime = Math.min(Math.max(seconds, ranges[0][0]), Math.max(0, this.end_s - EDGE_S));
    if (this.wantsPlay) this.#set("buffering");
  }

  toLive() {
    const [start] = this.ranges.at(-1) ?? [0];
    this.wantsPlay = true;
    this.isFollowing = true;
    this.#video.currentTime = Math.max(start, this.end_s - this.reserveS);
    this.jumps += 1;
    this.#set("buffering");
    this.#tick();
  }

  #set(state) {
    if (state === this.state) return;
    this.state = state;
    if (state === "playing" && this.stallStart !== null) {
      this.stalledMs += performance.now() - this.stallStart;
      this.stallStart = null;
    }
    this.#tell("state", state);
  }

  #fail(message) {
    this.#tell("failed", message);
  }

  #pump() {
    const buffer = this.#buffer;
    if (!buffer || buffer.updating || this.#source.readyState === "closed") return;
    if (!this.#queue.length) {
      if (this.#isEnded && this.#source.readyState === "open") this.#source.endOfStream();
      else this.#trim(KEEP_S + TRIM_STEP_S, KEEP_S);
      return;
    }
    try {
      buffer.appendBuffer(this.#queue[0]);
      this.#queue.shift();
    } catch (error) {
      // full: make room behind; if there is none, playing on makes some and timeupdate tries again
      if (error.name === "QuotaExceededError") this.#trim(TRIM_STEP_S, TRIM_STEP_S / 2);
      else this.#fail(`The browser could not take the video (${error.name}).`);
    }
  }

  #trim(whenOlderS, keepS) {
    const [first] = this.ranges;
    const now = this.#video.currentTime;
    if (this.#source.readyState !== "open" || !first || first[0] > now - whenOlderS) return;
    this.#buffer.remove(0, now - keepS);
  }

  #tick() {
    if (!this.#buffer || !this.ranges.length) return;
    this.#crossGap();
    const ahead = this.#ahead;
    const isAll = this.#isEnded && !this.#queue.length;
    // two chunks: only then is it known how fast they come
    const isEnough = ahead >= this.reserveS && this.#arrivals.length > 1;
    if (this.state === "buffering" && this.wantsPlay && (isEnough || (isAll && ahead > 0))) this.#start();
    this.#pace(ahead);
    this.#followLive();
  }

  #start() {
    this.hasStarted = true;
    this.#set("starting");
    this.#video.play().catch((error) => {
      if (error.name !== "NotAllowedError") return; // another seek or pause came in between
      this.wantsPlay = false;
      this.#set("paused");
    });
  }

  /** Slows down so that what is here lasts until more comes. */
  #pace(ahead) {
    if (this.#isEnded && ahead < TAIL_S) return; // the last frames are not worth a frame dropped by speeding up
    const rate = this.#isEnded ? null : this.rate;
    const wanted = this.reserveS + 0.5 * this.chunkS; // it swings by a chunk around this
    this.#level += (ahead - this.#level) * LEVEL_SHARE;
    const isSlow = rate !== null && rate < 1 && this.#level < 2 * wanted;
    const correction = 1 + 0.4 * (Math.min(this.#level, 2 * ahead) / wanted - 1);
    const speed = isSlow ? Math.min(1, Math.max(SLOWEST, rate * correction)) : 1;
    const now = this.#video.playbackRate;
    // in small steps: a leap from 0.4 to 1 drops a frame
    if (Math.abs(speed - now) > SPEED_STEP / 2) this.#video.playbackRate = Math.min(speed, now + SPEED_STEP);
  }

  /** Chunks may be missing: at the start for someone who comes later, inside for someone who fell behind. */
  #crossGap() {
    const now = this.#video.currentTime;
    if (this.#ahead > EDGE_S || this.#video.seeking) return;
    const next = this.ranges.find(([start]) => start > now);
    if (next) this.#video.currentTime = next[0] + EDGE_S / 2;
  }

  #followLive() {
    if (!this.isLive || !this.isFollowing || this.state !== "playing" || this.#isEnded) return;
    // a generator that outruns the clock is no lag of ours: jumping would only leave frames out
    const limit = Math.max(LAG_S, this.reserveS + 1.5 * this.chunkS);
    // of a slow one playing on makes up the lag
    if (!this.outruns && this.lag > (this.rate < 1 ? 2 * limit : limit)) {
      this.toLive();
      this.#tell("jump", this.jumps);
    }
  }

  #waits() {
    const isStall = this.hasStarted && this.wantsPlay && !this.#video.seeking && this.state === "playing";
    if (!isStall || this.#ahead > 2 * EDGE_S) return;
    this.stalls += 1;
    this.stallStart = performance.now();
    this.reserveS = Math.min(MOST_RESERVE_S, 1.5 * this.reserveS);
    this.#video.pause();
    this.#set("buffering");
    this.#tell("stall", this.stalls);
  }
}
