// What the server says of itself: which replicas there are and what they do.

import { readiness } from "./api.js";
import { byId, element, plural, setText } from "./dom.js";

const EVERY_MS = 3000;
const WORDS = { starting: "loads its model", idle: "idle", busy: "busy", lost: "lost, restarts" };

export class Facts {
  #timer = null;
  replicas = [];
  isReached = false;

  constructor(nameOf) {
    this.nameOf = nameOf; // what a video is called on this page
    const box = byId("replicas");
    box.addEventListener("keydown", ({ key }) => {
      if (key !== "Escape" || !box.open) return;
      box.open = false;
      box.querySelector("summary").focus();
    });
    document.addEventListener("pointerdown", ({ target }) => box.contains(target) || (box.open = false));
    this.refresh();
  }

  /** The replica that makes a video, if one does. */
  replicaOf(id) {
    return this.replicas.find((replica) => replica.video_id === id) ?? null;
  }

  async refresh() {
    clearTimeout(this.#timer);
    try {
      const facts = await readiness();
      this.isReached = true;
      this.replicas = facts.replicas ?? [];
      this.#show(facts);
    } catch (error) {
      this.isReached = false;
      this.replicas = [];
      byId("replicas").dataset.state = "away";
      byId("replica-dots").replaceChildren();
      setText(byId("server-state"), error.status === 401 ? "Needs a key" : "Server not reached");
    }
    this.#timer = setTimeout(() => (document.hidden ? this.#later() : this.refresh()), EVERY_MS);
  }

  #later() {
    document.addEventListener("visibilitychange", () => this.refresh(), { once: true });
  }

  #show(facts) {
    const count = (state) => this.replicas.filter((replica) => replica.state === state).length;
    const isReady = facts.status === "ready";
    const busy = count("busy");
    const words = isReady ? (busy ? `${busy} of ${plural(this.replicas.length, "replica")} busy` : "Ready") : "Not ready";
    byId("replicas").dataset.state = isReady ? "ready" : "starting";
    setText(byId("server-state"), count("lost") ? `${plural(count("lost"), "replica")} lost` : words);
    byId("replica-dots").replaceChildren(...this.replicas.map(({ state }) => element("i", { data: { state } })));
    const why = facts.error?.message; // of a server that is not ready
    byId("replica-list").replaceChildren(...this.replicas.map((replica) => this.#line(replica)), ...(why ? [element("li", {}, why)] : []));
  }

  #line(replica) {
    const ranks = replica.ranks > 1 ? ` · ${plural(replica.ranks, "rank")}` : "";
    const beat = typeof replica.beat_age_s === "number" ? ` · heard ${replica.beat_age_s.toFixed(1)} s ago` : "";
    const work = replica.video_id ? this.nameOf(replica.video_id) : "";
    return element(
      "li",
      { data: { state: replica.state } },
      element("strong", {}, `Replica ${replica.index}`),
      element("span", { class: "tag" }, WORDS[replica.state] ?? replica.state),
      element("span", { class: "hint" }, `${replica.device ?? ""}${ranks}${beat}`),
      work ? element("span", { class: "words" }, work) : null,
    );
  }
}
