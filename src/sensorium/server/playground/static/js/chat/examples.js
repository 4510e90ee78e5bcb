// Questions to begin with. Pictures and sounds are made here, so that nothing has to be loaded.

import { h, icon } from "../lib/dom.js";

const RATE = 16000;
const CLIP_TYPE = "video/webm;codecs=vp8";
const CLIP_SECONDS = 1.5;

/** Return the examples for what a model takes: {title, text, icon, file}. */
export function examplesFor({ modalities }) {
  const found = [];
  if (modalities.includes("image")) {
    found.push({ title: "Describe a picture", text: "What is in the picture?", icon: "image", file: () => picture("shapes.png", drawShapes) });
    found.push({ title: "Read a chart", text: "What color is the tallest bar?", icon: "image", file: () => picture("chart.png", drawBars) });
  }
  if (modalities.includes("video") && window.MediaRecorder && MediaRecorder.isTypeSupported(CLIP_TYPE)) {
    found.push({ title: "Watch a clip", text: "Does the circle move left or right?", icon: "film", file: () => clip("moving.webm") });
  }
  if (modalities.includes("audio")) {
    found.push({ title: "Listen to a tone", text: "Is the tone rising or falling?", icon: "sound", file: async () => tone("tone.wav") });
    found.push({ title: "Count beeps", text: "How many beeps are there?", icon: "sound", file: async () => beeps("beeps.wav", 3) });
  }
  found.push({ title: "Say hello", text: "Who are you?", icon: "chat", file: null });
  return found;
}

/** Return the cards of the examples; `use(example)` is called for the one that is chosen. */
export function exampleCards(facts, use) {
  return h("ul", { class: "examples" }, examplesFor(facts).map((example) => h("li", {},
    h("button", { type: "button", class: "example", onclick: () => use(example) },
      icon(example.icon), h("span", {}, h("b", {}, example.title), h("span", {}, example.text))))));
}

async function picture(name, draw) {
  const canvas = h("canvas", { width: 320, height: 240 });
  draw(canvas.getContext("2d"));
  const blob = await new Promise((resolve) => canvas.toBlob(resolve, "image/png"));
  return new File([blob], name, { type: "image/png" });
}

function drawShapes(context) {
  context.fillStyle = "#f4f1ea";
  context.fillRect(0, 0, 320, 240);
  context.fillStyle = "#d62828";
  context.beginPath();
  context.arc(90, 90, 46, 0, 2 * Math.PI);
  context.fill();
  context.fillStyle = "#1d4ed8";
  context.fillRect(190, 120, 84, 84);
}

function drawBars(context) {
  context.fillStyle = "#ffffff";
  context.fillRect(0, 0, 320, 240);
  [["#16a34a", 90], ["#f97316", 180], ["#1d4ed8", 60]].forEach(([color, height], i) => {
    context.fillStyle = color;
    context.fillRect(40 + 90 * i, 220 - height, 60, height);
  });
  context.fillStyle = "#333333";
  context.fillRect(20, 220, 280, 3);
}

/** Record a circle that moves to the right; that takes as long as the clip. */
async function clip(name) {
  const canvas = h("canvas", { width: 240, height: 180 });
  const context = canvas.getContext("2d");
  const draw = (share) => {
    context.fillStyle = "#ffffff";
    context.fillRect(0, 0, 240, 180);
    context.fillStyle = "#d62828";
    context.beginPath();
    context.arc(40 + 160 * share, 90, 26, 0, 2 * Math.PI);
    context.fill();
  };
  draw(0);
  const recorder = new MediaRecorder(canvas.captureStream(15), { mimeType: CLIP_TYPE, videoBitsPerSecond: 2_000_000 });
  const pieces = [];
  recorder.ondataavailable = ({ data }) => pieces.push(data);
  const stopped = new Promise((resolve) => (recorder.onstop = resolve));
  const began = performance.now();
  recorder.start();
  const timer = setInterval(() => {
    const share = (performance.now() - began) / 1000 / CLIP_SECONDS;
    draw(Math.min(1, share));
    if (share < 1) return;
    clearInterval(timer);
    recorder.stop();
  }, 60);
  await stopped;
  return new File(pieces, name, { type: "video/webm" });
}

function tone(name) {
  let phase = 0;
  const samples = Float32Array.from({ length: 1.5 * RATE }, (_, i) => {
    phase += (2 * Math.PI * (300 + (600 * i) / (1.5 * RATE))) / RATE;
    return 0.4 * Math.sin(phase);
  });
  return wav(name, samples);
}

function beeps(name, num) {
  const samples = new Float32Array(num * 0.45 * RATE + 0.2 * RATE);
  for (let beep = 0; beep < num; beep += 1) {
    const start = Math.round((0.15 + 0.45 * beep) * RATE);
    for (let i = 0; i < 0.18 * RATE; i += 1) {
      const edge = Math.min(1, i / 160, (0.18 * RATE - i) / 160);
      samples[start + i] = 0.4 * edge * Math.sin((2 * Math.PI * 660 * i) / RATE);
    }
  }
  return wav(name, samples);
}

/** Return samples as a WAV file of 16 bits and one channel. */
function wav(name, samples) {
  const view = new DataView(new ArrayBuffer(44 + 2 * samples.length));
  const text = (at, value) => [...value].forEach((char, i) => view.setUint8(at + i, char.charCodeAt(0)));
  text(0, "RIFF");
  view.setUint32(4, 36 + 2 * samples.length, true);
  text(8, "WAVEfmt ");
  view.setUint32(16, 16, true);
  view.setUint16(20, 1, true);
  view.setUint16(22, 1, true);
  view.setUint32(24, RATE, true);
  view.setUint32(28, 2 * RATE, true);
  view.setUint16(32, 2, true);
  view.setUint16(34, 16, true);
  text(36, "data");
  view.setUint32(40, 2 * samples.length, true);
  samples.forEach((sample, i) => view.setInt16(44 + 2 * i, Math.max(-1, Math.min(1, sample)) * 32767, true));
  return new File([view], name, { type: "audio/wav" });
}
