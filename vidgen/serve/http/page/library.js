// Queue, jobs and gallery: what the server has, kept up to date, with what can be done about each.

import { download, mediaAddress, videos } from "./api.js";
import { byId, complain, duration, element, plural, say, setShare, setText, settle } from "./dom.js";
import { ongoing } from "./records.js";

const BUSY_MS = 1500;
const IDLE_MS = 8000;
const WORDS = { queued: "queued", in_progress: "in progress", completed: "done", failed: "failed" };

export class Library {
  #records = new Map();
  #nodes = new Map();
  #timer = null;
  #oldest = null; // where "Show older" goes on
  #watch;
  #tell;
  #isReading = false;

  /** `watch(record)` shows one, `tell(record)` hears of every one that changed. */
  constructor(watch, tell) {
    this.#watch = watch;
    this.#tell = tell;
    byId("more").addEventListener("click", () => this.#older());
    document.addEventListener("visibilitychange", () => !document.hidden && this.refresh());
    this.refresh();
  }

  nameOf(id) {
    return this.#records.get(id)?.prompt ?? "";
  }

  get(id) {
    return this.#records.get(id) ?? null;
  }

  async refresh() {
    if (this.#isReading) return;
    this.#isReading = true;
    clearTimeout(this.#timer);
    try {
      const page = await videos.page();
      settle("server");
      this.#take(page.data);
      this.#forgetGone(page);
      if (this.#oldest === null) this.#setOlder(page);
    } catch (error) {
      complain(error.message, "server");
    }
    this.#isReading = false;
    this.#draw();
    const isBusy = [...this.#records.values()].some(ongoing);
    if (!document.hidden) this.#timer = setTimeout(() => this.refresh(), isBusy ? BUSY_MS : IDLE_MS);
  }

  async #older() {
    try {
      const page = await videos.page(this.#oldest);
      this.#take(page.data);
      this.#setOlder(page);
      this.#draw();
    } catch (error) {
      complain(error.message, "server");
    }
  }

  #setOlder({ has_more, last_id }) {
    this.#oldest = has_more ? last_id : null;
    byId("more").hidden = !has_more;
  }

  #take(records) {
    for (const record of records) {
      this.#records.set(record.id, record);
      this.#tell(record);
    }
  }

  /** Videos that others deleted: those that the newest page should have and has not. */
  #forgetGone({ data, has_more }) {
    const known = new Set(data.map((record) => record.id));
    const since = has_more ? data.at(-1).created_at + 1 : 0;
    for (const [id, record] of this.#records) {
      if (record.created_at >= since && !known.has(id)) this.#records.delete(id);
    }
  }

  // ---- what can be done

  async #act(words, action, record) {
    try {
      await action(record.id);
      settle("job");
      say(words);
    } catch (error) {
      complain(error.message, "job");
    }
    await this.refresh();
  }

  #delete(record) {
    const dialog = byId("delete-dialog");
    const isOn = ongoing(record) ? "It is not done yet: its work stops and its frames are lost too. " : "";
    byId("delete-text").textContent = `${isOn}“${record.prompt}” cannot be brought back.`;
    dialog.returnValue = "cancel";
    dialog.addEventListener(
      "close",
      async () => {
        if (dialog.returnValue !== "ok") return;
        await this.#act("Deleted", videos.remove, record);
        byId("jobs-title").focus();
      },
      { once: true },
    );
    dialog.showModal();
  }

  // ---- what is shown

  #draw() {
    const records = [...this.#records.values()].sort((a, b) => b.created_at - a.created_at);
    const isInGallery = (record) => record.status === "completed";
    const waiting = (record) => (record.status === "in_progress" ? 0 : record.status === "queued" ? 1 : 2);
    const jobs = records
      .filter((record) => !isInGallery(record))
      .sort((a, b) => waiting(a) - waiting(b) || (a.queue_position ?? 0) - (b.queue_position ?? 0));
    this.#place(byId("jobs"), jobs, (record) => this.#job(record), "Nothing waits and nothing failed.");
    this.#place(byId("gallery"), records.filter(isInGallery), (record) => this.#card(record), "Finished videos are kept here.");
  }

  /** Keeps nodes that are there, so that no focus is lost, and puts them in order. */
  #place(list, records, make, empty) {
    const kept = new Set();
    let last = null;
    for (const record of records) {
      const key = `${list.id}/${record.id}/${record.status}`;
      kept.add(key);
      if (!this.#nodes.has(key)) this.#nodes.set(key, make(record));
      const node = this.#nodes.get(key);
      node.update?.(record);
      const next = last ? last.nextElementSibling : list.firstElementChild;
      if (next !== node) list.insertBefore(node, next);
      last = node;
    }
    for (const [key, node] of this.#nodes) {
      if (!key.startsWith(`${list.id}/`) || kept.has(key)) continue;
      node.remove();
      this.#nodes.delete(key);
    }
    list.querySelector(".nothing")?.remove();
    if (!records.length) list.append(element("li", { class: "nothing hint" }, empty));
  }

  #button(word, record, act, kind = "") {
    return element(
      "button",
      { type: "button", class: kind, "aria-label": `${word}: ${record.prompt}`, onclick: () => act(this.#records.get(record.id) ?? record) },
      word,
    );
  }

  #job(record) {
    const facts = element("span", { class: "hint" });
    const meter = element("div", { class: "meter" }, element("i"));
    const isOn = ongoing(record);
    const node = element(
      "li",
      { class: "job", data: { id: record.id, status: record.status } },
      element("span", { class: "words" }, record.prompt),
      element("span", { class: "facts" }, element("span", { class: "tag", data: { status: record.status } }, this.#word(record)), facts),
      isOn ? meter : null,
      element(
        "span",
        { class: "row actions" },
        record.status === "queued" || (!isOn && !record.frames_done) ? null : this.#button("Watch", record, (now) => this.#watch(now)),
        isOn ? this.#button(record.kind === "session" ? "End" : "Cancel", record, (now) => this.#act("Cancelled", videos.cancel, now)) : null,
        record.status === "failed" ? this.#button("Resume", record, (now) => this.#act("In the queue again", videos.resume, now)) : null,
        this.#button("Delete", record, (now) => this.#delete(now), "quiet"),
      ),
    );
    node.update = (now) => {
      setText(facts, jobFacts(now));
      setShare(meter.firstElementChild, 0, now.progress / 100);
      meter.hidden = now.kind === "session" || now.status === "queued";
    };
    return node;
  }

  #word(record) {
    if (record.error?.code === "cancelled") return "cancelled";
    return record.kind === "session" && record.status === "in_progress" ? "live" : WORDS[record.status];
  }

  #card(record) {
    const picture = element("img", { alt: "", loading: "lazy", decoding: "async" });
    picture.addEventListener("error", () => picture.remove());
    mediaAddress(record.id, "content?variant=thumbnail").then((address) => (picture.src = address), () => picture.remove());
    const facts = [`${Number(record.seconds).toFixed(1)} s`, record.size.replace("x", "×"), `seed ${record.seed}`];
    if (record.kind === "session") facts.push("live session");
    return element(
      "li",
      { class: "card", data: { id: record.id } },
      element("button", { type: "button", class: "picture", "aria-label": `Watch: ${record.prompt}`, onclick: () => this.#watch(record) }, picture),
      element("p", { class: "words" }, record.prompt),
      element("p", { class: "hint" }, facts.join(" · ")),
      element(
        "span",
        { class: "row actions" },
        this.#button("Download", record, (now) => this.#save(now)),
        this.#button("Delete", record, (now) => this.#delete(now), "quiet"),
      ),
    );
  }

  async #save(record) {
    try {
      await download(record.id, false);
    } catch (error) {
      complain(error.message, "job");
    }
  }
}

function jobFacts(record) {
  if (record.status === "queued") {
    return record.queue_position ? `${plural(record.queue_position, "video")} before it` : "next";
  }
  if (record.status === "failed") {
    const kept = record.frames_done ? `${plural(record.frames_done, "frame")} kept` : "";
    return record.error?.code === "cancelled" ? kept : [record.error?.message, kept].filter(Boolean).join(" · ");
  }
  if (record.kind === "session") return `${(record.frames_done / record.fps).toFixed(0)} s made`;
  const left = record.eta_s ? ` · about ${duration(record.eta_s)} left` : "";
  return `${record.progress} % · chunk ${record.chunks_done} of ${record.chunks_total}${left}`;
}
