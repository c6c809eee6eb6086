// Watching by HLS, where the socket or Media Source Extensions do not work.

import { address, authorization, events, mediaAddress } from "./api.js";

/** Something with close(); `fail(message)` is called at most once, when nothing can be shown. */
export async function playHls(video, id, fail) {
    const { default: Hls } = await import("./hls.light.min.js");
  if (!Hls.isSupported()) return playNatively(video, id, fail);
  const hls = new Hls({
    enableWorker: false, // its worker is a blob, which the page's policy does not allow
    liveSyncDuration: 1.5,
    liveMaxLatencyDuration: 8,
    backBufferLength: 60,
    xhrSetup: (xhr) => {
      for (const [name, value] of Object.entries(authorization())) xhr.setRequestHeader(name, value);
    },
  });
  hls.on(Hls.Events.ERROR, (_, data) => {
    if (!data.fatal) return;
    hls.destroy();
    fail(`The video could not be loaded (${data.details}).`);
  });
  hls.on(Hls.Events.MANIFEST_PARSED, () => video.play().catch(() => {}));
  hls.loadSource(address(`v1/videos/${id}/hls/index.m3u8`).href);
  hls.attachMedia(video);
  return { close: () => hls.destroy() };
}

async function playNatively(video, id, fail) {
  if (!video.canPlayType("application/vnd.apple.mpegurl")) {
    fail("This browser can play neither live MP4 nor HLS. Wait for the video to be done, then download it.");
    return { close: () => {} };
  }
  video.src = await mediaAddress(id, "hls/index.m3u8");
  video.addEventListener("error", () => fail("The video could not be loaded."), { once: true });
  video.play().catch(() => {});
  return { close: () => video.removeAttribute("src") };
}

/** Passes on the events of a video under the names that the socket has for them. */
export async function hearEvents(id, signal, hear) {
  const names = { prompt_applied: "session.interaction.applied", progress: "session.progress", note: "session.note" };
  try {
    for await (const { name, data } of events(id, signal)) if (names[name]) hear(names[name], data);
  } catch {
    // marks only: the list tells how far it is
  }
}
