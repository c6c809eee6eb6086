// The editor of prompts over time. The order of the cards in the document is the order of the segments.

import { byId, duration, element, say, setShare } from "./dom.js";

const COLOURS = 6; // of the strip, in style.css
const FIRST_S = 4;

export class Timeline {
  #list = byId("segments");
  #strip = byId("strip");
  #changed;

  constructor(changed) {
    this.#changed = changed;
    byId("add-segment").addEventListener("click", () => this.add({ focus: true }));
    this.#list.addEventListener("input", () => this.#update());
    this.#list.addEventListener("keydown", (event) => this.#key(event));
    this.add({});
  }

  /** [{prompt, seconds}] as typed; seconds may be NaN. */
  get segments() {
    return this.#cards.map((card) => ({
      prompt: card.querySelector("textarea").value.trim(),
      seconds: Number.parseFloat(card.querySelector("input").value.replace(",", ".")),
    }));
  }

  set isOpenEnded(isOpen) {
    this.#list.classList.toggle("open-ended", isOpen);
    this.#update();
  }

  get #cards() {
    return [...this.#list.children];
  }

  add({ prompt = "", focus = false }) {
    const seconds = this.#cards.at(-1)?.querySelector("input").value ?? String(FIRST_S);
    const text = element("textarea", { rows: 3, maxLength: 4000, value: prompt });
    const card = element(
      "li",
      { class: "segment" },
      element("button", { type: "button", class: "handle", tabIndex: -1, onpointerdown: (event) => this.#drag(event, card) }),
      element("label", { class: "prompt" }, element("span", { class: "number" }), text),
      element(
        "label",
        { class: "seconds" },
        element("input", { inputMode: "decimal", autocomplete: "off", value: seconds }),
        element("span", {}, "seconds"),
      ),
      element("span", { class: "until" }, "until you stop"),
      element(
        "span",
        { class: "moves" },
        this.#action("up", "↑", () => this.#move(card, -1)),
        this.#action("down", "↓", () => this.#move(card, 1)),
        this.#action("remove", "×", () => this.#remove(card)),
      ),
    );
    this.#list.append(card);
    this.#update();
    if (focus) text.focus();
  }

  /** The card at fault, so that it can be corrected at once. */
  focus(index) {
    this.#cards[index]?.querySelector("textarea").focus();
  }

  #action(kind, sign, act) {
    return element("button", { type: "button", class: `icon small ${kind}`, onclick: act }, sign);
  }

  #move(card, by) {
    const cards = this.#cards;
    const to = cards.indexOf(card) + by;
    if (to < 0 || to >= cards.length) return;
    const focused = document.activeElement;
    if (by < 0) cards[to].before(card);
    else cards[to].after(card);
    if (card.contains(focused)) focused.focus(); // moving in the document takes it away
    this.#update();
    say(`Prompt ${to + 1} of ${cards.length}`);
  }

  #remove(card) {
    const index = this.#cards.indexOf(card);
    card.remove();
    this.#update();
    this.focus(Math.min(index, this.#cards.length - 1));
    say("Prompt removed");
  }

  #key(event) {
    const card = event.target.closest(".segment");
    if (!event.altKey || !card || !["ArrowUp", "ArrowDown"].includes(event.key)) return;
    event.preventDefault();
    this.#move(card, event.key === "ArrowUp" ? -1 : 1);
  }

  /** By mouse or finger: the card goes where the pointer is. */
  #drag(event, card) {
    event.preventDefault();
    card.classList.add("dragged");
    const follow = ({ clientY }) => {
      const others = this.#cards.filter((other) => other !== card);
      const next = others.find((other) => {
        const box = other.getBoundingClientRect();
        return clientY < box.top + box.height / 2;
      });
      if (next ? card.nextElementSibling === next : card === this.#list.lastElementChild) return;
      this.#list.insertBefore(card, next ?? null);
      this.#update();
    };
    const drop = () => {
      card.classList.remove("dragged");
      document.removeEventListener("pointermove", follow);
    };
    document.addEventListener("pointermove", follow);
    document.addEventListener("pointerup", drop, { once: true });
    document.addEventListener("pointercancel", drop, { once: true });
  }

  #update() {
    const cards = this.#cards;
    const isSingle = cards.length === 1;
    this.#list.classList.toggle("single", isSingle);
    cards.forEach((card, index) => {
      const name = isSingle ? "Prompt" : `Prompt ${index + 1}`;
      card.dataset.colour = index % COLOURS;
      card.querySelector(".number").textContent = name;
      card.querySelector("textarea").placeholder = index
        ? "and then…"
        : "a red circle moving left over a gray background";
      card.querySelector("input").setAttribute("aria-label", `Seconds of ${name.toLowerCase()}`);
      card.querySelector(".handle").setAttribute("aria-label", `Drag ${name.toLowerCase()}`);
      for (const [kind, word] of [["up", "Move up"], ["down", "Move down"], ["remove", "Remove"]]) {
        card.querySelector(`.${kind}`).setAttribute("aria-label", `${word}: ${name.toLowerCase()}`);
      }
      card.querySelector(".up").disabled = index === 0;
      card.querySelector(".down").disabled = index === cards.length - 1;
    });
    this.#drawStrip();
    this.#changed();
  }

  #drawStrip() {
    const lengths = this.segments.map(({ seconds }) => (seconds > 0 ? seconds : 0));
    const total = lengths.reduce((sum, one) => sum + one, 0);
    let start = 0;
    const pieces = lengths.map((length, index) => {
      const piece = element("button", { type: "button", tabIndex: -1, data: { colour: index % COLOURS } }, String(index + 1));
      piece.addEventListener("click", () => this.focus(index));
      setShare(piece, total ? start / total : 0, total ? length / total : 1 / lengths.length);
      start += length;
      return piece;
    });
    this.#strip.replaceChildren(...pieces);
    this.#strip.hidden = lengths.length < 2;
    const isOpen = this.#list.classList.contains("open-ended");
    byId("total").textContent = isOpen ? "" : total > 0 && lengths.length > 1 ? `${duration(total)} in all` : "";
  }
}
