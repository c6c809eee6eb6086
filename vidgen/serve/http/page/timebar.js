// The bar under the player: what is made, loaded and played, where prompts change, and what plays now.

import { byId, clock, element, setShare, setText } from "./dom.js";

const SEEK_STEP_S = 1;

export class TimeBar {
  #marks = new Map();
  #seek = byId("seek");
  #scale = 0;
  #now = null;

  /** `move(seconds)` is called for every wish to be elsewhere. */
  constructor(move) {
    this.move = move;
    this.#seek.addEventListener("input", () => move(Number(this.#seek.value)));
    byId("video").addEventListener("keydown", (event) => {
      const by = { ArrowLeft: -SEEK_STEP_S, ArrowRight: SEEK_STEP_S }[event.key];
      if (by === undefined || event.altKey || event.ctrlKey || event.metaKey) return;
      event.preventDefault();
      move(byId("video").currentTime + by);
    });
  }

  clear() {
    this.#marks.clear();
    this.#scale = 0;
    this.#now = null;
    this.#drawMarks();
    this.update({ current: 0, made: 0, ranges: [], total: 0 });
    byId("now").hidden = true;
  }

  /** A prompt: with `seconds` where it holds from, without while it waits to be applied. */
  mark(id, { prompt, seconds = null, refused = null, over = 0 }) {
    const known = this.#marks.get(id) ?? {};
    this.#marks.set(id, {
      prompt: prompt ?? known.prompt ?? "",
      seconds: seconds ?? known.seconds ?? null,
      refused: refused ?? known.refused ?? null,
      over: over || known.over || 0,
    });
    this.#drawMarks();
  }

  /** A change holds for all that follows: what was planned after it will not come. */
  supersede(from, prefix) {
    for (const [id, mark] of this.#marks) if (id.startsWith(prefix) && mark.seconds > from) this.#marks.delete(id);
    this.#drawMarks();
  }

  /** Those that will never be applied now. */
  forgetWaiting() {
    for (const [id, mark] of this.#marks) if (mark.seconds === null && !mark.refused) this.#marks.delete(id);
    this.#drawMarks();
  }

  get waiting() {
    return [...this.#marks.values()].filter((mark) => mark.seconds === null && !mark.refused).length;
  }

  /** All in seconds. `total` is 0 for a video whose length is open. */
  update({ current, made, ranges, total }) {
    const end = Math.max(made, ranges.at(-1)?.[1] ?? 0);
    const scale = Math.max(total || 0, end, 0.001);
    this.#seek.max = String(total ? scale : end);
    this.#seek.disabled = end === 0;
    if (document.activeElement !== this.#seek || Math.abs(this.#seek.value - current) > 0.2) {
      this.#seek.value = String(current);
    }
    this.#seek.setAttribute("aria-valuetext", `${clock(current)} of ${clock(total || end)}`);
    setText(byId("time"), `${clock(current)} / ${clock(total || end)}`);
    setShare(byId("bar-made"), 0, made / scale);
    const start = ranges[0]?.[0] ?? 0;
    setShare(byId("bar-loaded"), start / scale, ((ranges.at(-1)?.[1] ?? 0) - start) / scale);
    setShare(byId("bar-played"), 0, current / scale);
    if (scale !== this.#scale) {
      this.#scale = scale;
      this.#placeMarks();
    }
    this.#tellNow(current);
  }

  get #applied() {
    return [...this.#marks.entries()].filter(([, mark]) => mark.seconds !== null).sort((a, b) => a[1].seconds - b[1].seconds);
  }

  #drawMarks() {
    const marks = this.#applied;
    byId("marks").replaceChildren(
      ...marks.filter(([, mark]) => mark.seconds > 0).map(([id, mark]) => element("i", { data: { id }, title: `${clock(mark.seconds)} ${mark.prompt}` })),
    );
    const waiting = [...this.#marks.entries()].filter(([, mark]) => mark.seconds === null);
    // a single prompt is told by the line "Now"
    const isShown = marks.length + waiting.length > 1;
    byId("changes").replaceChildren(...(isShown ? [...marks, ...waiting].map(([id, mark]) => this.#line(id, mark)) : []));
    this.#placeMarks();
    this.#now = null;
  }

  #line(id, mark) {
    const state = mark.refused ? "refused" : mark.seconds === null ? "waiting" : "applied";
    const when = state === "applied" ? clock(mark.seconds) : state === "waiting" ? "soon" : "not";
    const over = mark.over ? ` over ${mark.over} chunk${mark.over === 1 ? "" : "s"}` : "";
    const prompt = element("span", { class: "words" }, mark.prompt);
    const note = element("span", { class: "hint" }, mark.refused ?? (state === "waiting" ? `waits for the next chunk${over}` : ""));
    const time =
      state === "applied"
        ? element("button", { type: "button", class: "when", onclick: () => this.move(mark.seconds), "aria-label": `Go to ${when}, ${mark.prompt}` }, when)
        : element("span", { class: "when" }, when);
    return element("li", { data: { id, state, seconds: mark.seconds ?? "" } }, time, prompt, note);
  }

  #placeMarks() {
    for (const node of byId("marks").children) {
      const { seconds } = this.#marks.get(node.dataset.id);
      node.hidden = seconds > this.#scale; // to come
      setShare(node, seconds / (this.#scale || 1), 0);
    }
  }

  #tellNow(current) {
    const [id, mark] = this.#applied.filter(([, one]) => one.seconds <= current + 0.01).at(-1) ?? [];
    if (!mark || id === this.#now) return;
    this.#now = id;
    byId("now").hidden = false;
    setText(byId("now-prompt"), mark.prompt);
    for (const line of byId("changes").children) {
      if (line.dataset.id === id) line.setAttribute("aria-current", "true");
      else line.removeAttribute("aria-current");
    }
  }
}
