// The frames of a video that the model has seen, drawn from the file in the browser.

import { h } from "../lib/dom.js";
import { clock, counted } from "../lib/format.js";

const MOST = 24;
const HEIGHT = 72;
const STEP_SECONDS = 5;

/**
 * Return a strip of the frames that `item` (of the metrics of an answer) names.
 *
 * Each is drawn at the middle of its time. What this browser cannot play is shown by its times alone.
 */
export function frameStrip(item, src, name) {
  const shown = evenly(item.frames, MOST);
  const total = item.num_source_frames;
  const title = `The model sees ${counted(item.num_frames ?? item.frames.length, "frame")}${total ? ` of ${total}` : ""}`
    + (shown.length < item.frames.length ? `; ${shown.length} of them are shown` : "");
  const cells = shown.map((index) => {
    const time = item.fps ? index / item.fps : null;
    const caption = time === null ? `frame ${index}` : time < 60 ? `${time.toFixed(2)} s` : clock(time);
    return h("li", { class: "frame" }, h("div", { class: "frame-picture" }), h("span", {}, caption));
  });
  const strip = h("figure", { class: "frames" }, h("figcaption", {}, title),
    h("ol", { class: "frame-list", tabindex: "0", "aria-label": `Frames of ${name} that the model sees` }, cells));
  if (src) {
    draw(src, shown, item, cells.map((cell) => cell.firstChild)).catch(() => strip.classList.add("frames-bare"));
  } else strip.classList.add("frames-bare");
  return strip;
}

function evenly(values, most) {
  if (values.length <= most) return values;
  return Array.from({ length: most }, (_, i) => values[Math.floor((i * values.length) / most)]);
}

async function draw(src, frames, item, places) {
  const video = h("video", { src, muted: true, preload: "auto", playsinline: true });
  video.muted = true;
  await event(video, "loadeddata");
  const length = Number.isFinite(video.duration) ? video.duration : 0;
  const fps = item.fps || (length && item.num_source_frames ? item.num_source_frames / length : 0);
  if (!fps) throw new Error("no times are known");
  for (const [at, index] of frames.entries()) {
    const time = (index + 0.5) / fps;
    video.currentTime = length ? Math.min(time, Math.max(0, length - 0.001)) : time;
    await event(video, "seeked");
    const width = Math.max(1, Math.round((HEIGHT * video.videoWidth) / Math.max(1, video.videoHeight)));
    const canvas = h("canvas", { width: Math.min(width, 4 * HEIGHT), height: HEIGHT, "aria-hidden": "true" });
    canvas.getContext("2d").drawImage(video, 0, 0, canvas.width, HEIGHT);
    places[at].replaceChildren(canvas);
  }
  video.removeAttribute("src");
  video.load();
}

function event(video, name) {
  return new Promise((resolve, reject) => {
    const timer = setTimeout(() => reject(new Error("the video does not answer")), STEP_SECONDS * 1000);
    video.addEventListener(name, () => (clearTimeout(timer), resolve()), { once: true });
    video.addEventListener("error", () => (clearTimeout(timer), reject(new Error("the video cannot be played"))), { once: true });
  });
}
