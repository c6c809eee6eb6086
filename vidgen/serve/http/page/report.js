// Under the player: how far the video is, how fast it is made, by whom, and whether it still gets on.

import { byId, duration, element, plural, say, setShare, setText } from "./dom.js";
import { ongoing, percent, queueWords } from "./records.js";

const QUIET_S = 6; // without a chunk before something is said
const QUIET_CHUNKS = 4; // and more where chunks are rare
const MAX_CELLS = 120; // of the row of chunks

export class Report {
  #facts;

  constructor(facts) {
    this.#facts = facts;
  }

  /** `watching` is null while nothing is shown. */
  draw(watching, player, hasPicture) {
    this.#drawBadge(watching, player, hasPicture);
    const record = watching?.record;
    byId("progress").hidden = !record;
    const quiet = watching ? this.#quiet(watching, player) : "";
    if (quiet && !byId("stall").textContent) say(quiet);
    setText(byId("stall"), quiet);
    if (!record) return;
    const isOn = ongoing(record) && !watching.isDone;
    const isMeasured = !watching.isSession && isOn;
    byId("progress-bar").hidden = byId("chunks").hidden = !isMeasured;
    setText(byId("progress-text"), this.#howFar(watching, isOn));
    setText(byId("progress-eta"), isOn && !watching.isSession && record.eta_s ? `about ${duration(record.eta_s)} left` : "");
    setText(byId("where"), this.#where(watching, player, isOn));
    if (isMeasured) this.#drawMeter(record);
  }

  #drawBadge(watching, player, hasPicture) {
    const isLive = Boolean(watching?.isSession) && hasPicture && !watching.isDone;
    byId("badge").hidden = !isLive;
    if (!isLive) return;
    const behind = player.isOpen ? player.lag - player.reserveS : 0;
    const isAtEdge = behind < 2 && player.wantsPlay;
    byId("badge").classList.toggle("behind", !isAtEdge);
    byId("to-live").classList.toggle("behind", !isAtEdge);
    setText(byId("badge"), isAtEdge ? "Live" : `${player.lag.toFixed(0)} s behind the newest frame`);
  }

  #howFar({ record, isSession, isDone, made, fps }, isOn) {
    if (record.status === "queued" && !record.frames_done) {
      return queueWords(record.queue_position);
    }
    if (record.status === "failed") return record.error?.code === "cancelled" ? "Cancelled" : "Failed";
    if (!isOn) return record.size ? `${record.size.replace("x", "×")} · ${plural(record.num_frames, "frame")} · ${fps} a second` : "";
    if (isSession && !isDone) return `${made.toFixed(1)} s made`;
    const chunks = record.chunks_total ? ` · chunk ${record.chunks_done} of ${record.chunks_total}` : "";
    return `${percent(record)} %${chunks}`;
  }

  #where({ id, isSession, chunks }, player, isOn) {
    if (!isOn) return "";
    const parts = [];
    const replica = this.#facts.replicaOf(id);
    if (replica) {
      const ranks = replica.ranks > 1 ? `, ${plural(replica.ranks, "rank")}` : "";
      parts.push(`on replica ${replica.index} (${replica.device ?? "?"}${ranks})`);
    }
    if (isSession && chunks) parts.push(plural(chunks, "chunk"));
    if (player.isOpen && player.rate) parts.push(speedWords(player.rate, player.speed));
    return parts.join(" · ");
  }

  #drawMeter(record) {
    const meter = byId("progress-bar");
    meter.setAttribute("aria-valuenow", String(percent(record)));
    setShare(meter.firstElementChild, 0, percent(record) / 100);
    const total = Math.min(record.chunks_total ?? 0, MAX_CELLS);
    const row = byId("chunks");
    row.hidden = total < 2;
    meter.classList.toggle("unseen", total >= 2); // the chunks show the same
    if (row.childElementCount !== total) row.replaceChildren(...Array.from({ length: total }, () => element("i")));
    const done = Math.floor((total * (record.chunks_done ?? 0)) / (record.chunks_total || 1));
    [...row.children].forEach((cell, index) => {
      cell.className = index < done ? "done" : index === done ? "next" : "";
    });
  }

  /** A line when nothing came for long, with what is known of why. */
  #quiet({ id, record, isDone, newsAt, openedAt, chunkEveryS, mode }, player) {
    if (isDone || record?.status !== "in_progress" || mode === "file" || mode === "hls") return "";
    const quiet = (performance.now() - (newsAt ?? openedAt)) / 1000;
    if (quiet < Math.max(QUIET_S, QUIET_CHUNKS * (chunkEveryS ?? 0))) return "";
    const words = newsAt === null ? "No frames yet after" : "No new frames for";
    const replica = this.#facts.replicaOf(id);
    let why = "";
    if (!this.#facts.isReached) why = "The server is not reached.";
    else if (replica?.state === "lost") why = `Replica ${replica.index} is lost; it is started again and goes on from the last chunk.`;
    else if (!replica) why = "No replica works on it just now.";
    else why = player.wantsPlay ? "The replica still answers." : "";
    return `${words} ${Math.floor(quiet)} s. ${why}`.trim();
  }
}

function speedWords(rate, speed) {
  const made = `made at ${rate.toFixed(1)} times its speed`;
  return speed < 0.97 ? `${made}, so it plays slowed down` : made;
}
