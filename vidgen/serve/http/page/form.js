// What is asked of the server: the form read, checked and put into the API's words.

import { byId } from "./dom.js";
import { Timeline } from "./timeline.js";

const FALLBACK_FPS = 16; // sent along whenever it is used
const LIVE_S = 600; // of a session whose last prompt holds until it is stopped
const WHOLE = /^\d+$/;
const HINTS = {
  live: "Watch while it is made, and change the prompt as it plays.",
  render: "Goes into the queue; watch it grow, keep the file.",
};
// field, name in the API, words, test
const NUMBERS = [
  ["width", "width", "Width", WHOLE],
  ["height", "height", "Height", WHOLE],
  ["steps", "num_inference_steps", "Steps", WHOLE],
  ["fps", "fps", "Frames a second", WHOLE],
  ["seed", "seed", "Seed", WHOLE],
  ["guidance", "guidance_scale", "Guidance", /^\d*[.,]?\d+$/],
  ["shift", "flow_shift", "Flow shift", /^\d*[.,]?\d+$/],
];

const PLACEHOLDERS = { seed: "drawn by the server" };

/** What cannot be sent, and where the cursor should go. */
export class FormError extends Error {
  constructor(message, focus) {
    super(message);
    this.focus = focus;
  }
}

export class Form {
  #timeline;
  #models = new Map();

  constructor() {
    this.#timeline = new Timeline(() => this.#facts());
    this.#timeline.focus(0);
    byId("form").addEventListener("change", () => this.#mode());
    byId("settings").addEventListener("input", () => this.#facts());
    byId("dice").addEventListener("click", () => {
      byId("seed").value = String(Math.floor(Math.random() * 2 ** 31));
      this.#facts();
    });
    byId("form").addEventListener("keydown", (event) => {
      if (event.key !== "Enter" || !(event.ctrlKey || event.metaKey)) return;
      event.preventDefault();
      byId("form").requestSubmit();
    });
    this.#mode();
  }

  get isLive() {
    return new FormData(byId("form")).get("mode") === "live";
  }

  set models(list) {
    this.#models = new Map(list.map((model) => [model.id, model]));
    const chosen = byId("model").value;
    byId("model").replaceChildren(...list.map(({ id }) => new Option(id, id, false, id === chosen)));
    byId("model-field").hidden = list.length < 2;
    this.#mode();
  }

  get #defaults() {
    const defaults = this.#models.get(byId("model").value)?.defaults ?? {};
    const [width, height] = defaults.size?.split("x") ?? [];
    return { width, height, ...defaults };
  }

  get #fps() {
    return Number(byId("fps").value.trim()) || this.#defaults.fps || null;
  }

  /** The body of POST /v1/videos or session.start. FormError for what is missing or no number. */
  read() {
    const request = {};
    if (this.#models.size > 1) request.model = byId("model").value;
    for (const [field, name, words, test] of NUMBERS) {
      const text = byId(field).value.trim();
      if (!text) continue;
      if (!test.test(text)) throw new FormError(`${words}: ${text} is no such number.`, () => reveal(field));
      request[name] = Number(text.replace(",", "."));
    }
    const negative = byId("negative").value.trim();
    if (negative) request.negative_prompt = negative;
    this.#readPrompts(request);
    if (this.isLive) request.policy = byId("policy").value;
    return request;
  }

  #readPrompts(request) {
    const segments = this.#timeline.segments;
    segments.forEach(({ prompt, seconds }, index) => {
      const name = segments.length > 1 ? `Prompt ${index + 1}` : "The prompt";
      const focus = () => this.#timeline.focus(index);
      if (!prompt) throw new FormError(`${name} is empty: say what the video is of.`, focus);
      const isEndless = this.isLive && index === segments.length - 1;
      if (!isEndless && !(seconds > 0)) throw new FormError(`${name} needs its seconds, for example 4.`, focus);
    });
    if (segments.length === 1) {
      request.prompt = segments[0].prompt;
      if (!this.isLive) request.seconds = String(segments[0].seconds);
      return;
    }
    const fps = this.#fps ?? FALLBACK_FPS;
    request.fps = fps;
    const lengths = segments.map(({ seconds }) => seconds);
    if (this.isLive) {
      const before = lengths.slice(0, -1).reduce((sum, one) => sum + one, 0);
      lengths[lengths.length - 1] = Math.max(1, LIVE_S - before);
    }
    request.segments = segments.map(({ prompt }, index) => ({
      prompt,
      num_frames: Math.max(1, Math.round(lengths[index] * fps)),
    }));
  }

  #mode() {
    const isLive = this.isLive;
    byId("mode-hint").textContent = isLive ? HINTS.live : HINTS.render;
    byId("submit").textContent = isLive ? "Start live" : "Render";
    byId("form").classList.toggle("is-live", isLive);
    this.#timeline.isOpenEnded = isLive;
    for (const [field, name] of NUMBERS) byId(field).placeholder = this.#defaults[name] ?? PLACEHOLDERS[field] ?? "model's";
    this.#facts();
  }

  #facts() {
    const value = (id) => byId(id).value.trim();
    const facts = [
      value("width") && value("height") ? `${value("width")}×${value("height")}` : "",
      value("steps") ? `${value("steps")} steps` : "",
      value("seed") ? `seed ${value("seed")}` : "",
    ].filter(Boolean);
    byId("settings-facts").textContent = facts.join(" · ");
  }
}

function reveal(id) {
  byId("settings").open = true;
  byId(id).focus();
}
