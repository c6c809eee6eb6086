// What the page knows of videos by itself: which go on, and which session this tab is in.

import { plural } from "./dom.js";

const REMEMBERED = "vidgen.session";
const GROWING = ["frames_done", "chunks_done"];

export const ongoing = (record) => record?.status === "queued" || record?.status === "in_progress";

/** The session that this tab was in when it was reloaded. */
export const remembered = () => sessionStorage.getItem(REMEMBERED);
export const remember = (id) => sessionStorage.setItem(REMEMBERED, id);
export const forget = () => sessionStorage.removeItem(REMEMBERED);

/** What a change of this tab says: the server tells where it is applied, by its name. */
export const promptOf = (id) => sessionStorage.getItem(`vidgen.${id}`);
export const rememberPrompt = (id, prompt) => sessionStorage.setItem(`vidgen.${id}`, prompt);

/** The socket, the events and the list all tell how far a video is; the furthest is the newest. */
export function merged(known, told) {
  const both = { ...known, ...told };
  for (const name of GROWING) both[name] = Math.max(known[name] ?? 0, told[name] ?? 0);
  return both;
}

export function queueWords(position) {
  return position > 0 ? `In the queue, ${plural(position, "video")} before this one` : "Next in the queue";
}

/** Percent, from whichever is ahead. */
export function percent(record) {
  const share = record.num_frames ? record.frames_done / record.num_frames : 0;
  return Math.max(record.progress ?? 0, Math.min(99, Math.floor(100 * share)));
}
