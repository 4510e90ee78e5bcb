// Recording from camera and microphone.

import { announce, h, icon, openDialog, textButton, toast } from "../lib/dom.js";
import { clock } from "../lib/format.js";

const MOST_SECONDS = 60;
const VIDEO_TYPES = ["video/webm;codecs=vp9", "video/webm;codecs=vp8", "video/webm", "video/mp4"];
const AUDIO_TYPES = ["audio/webm;codecs=opus", "audio/webm", "audio/mp4", "audio/ogg"];

/** Return why a browser cannot record, as a sentence; null when it can. */
export function whyNot() {
  if (!window.isSecureContext) return "Browsers record only on pages from https or from this machine itself.";
  if (!navigator.mediaDevices?.getUserMedia || !window.MediaRecorder) return "This browser cannot record.";
  return null;
}

/** Open devices; a camera whose sound is missing or forbidden is opened without it. */
async function mediaOf(constraints) {
  try {
    return await navigator.mediaDevices.getUserMedia(constraints);
  } catch (error) {
    const canDoWithout = constraints.video && constraints.audio && ["NotFoundError", "NotAllowedError"].includes(error.name);
    if (!canDoWithout) throw error;
    return navigator.mediaDevices.getUserMedia({ ...constraints, audio: false });
  }
}

async function devices(constraints) {
  const reason = whyNot();
  if (reason) {
    toast(reason, { error: true });
    return null;
  }
  try {
    return await mediaOf(constraints);
  } catch (error) {
    const what = constraints.video ? "camera" : "microphone";
    const text = error.name === "NotFoundError" ? `No ${what} was found.`
      : error.name === "NotAllowedError" ? `The browser was not allowed to use the ${what}.`
        : `The ${what} cannot be used now; another program may have it.`;
    toast(text, { error: true });
    return null;
  }
}

function file(blob, kind, type) {
  const extension = { "video/webm": "webm", "video/mp4": "mp4", "audio/webm": "webm", "audio/mp4": "m4a", "audio/ogg": "ogg", "image/png": "png" }[type] ?? "bin";
  const stamp = new Date().toTimeString().slice(0, 8).replaceAll(":", "-");
  return new File([blob], `${kind} ${stamp}.${extension}`, { type });
}

/** Open the camera. `kinds`: "image", "video" or both. `withSound`: the model hears clips. `onfile` gets what was taken. */
export async function openCamera(kinds, withSound, onfile) {
  const stream = await devices({ video: { facingMode: "environment" }, audio: withSound && kinds.includes("video") });
  if (!stream) return;
  const preview = h("video", { srcObject: stream, autoplay: true, muted: true, playsinline: true, class: "camera", "aria-label": "Picture of the camera" });
  preview.muted = true;
  const time = h("span", { class: "record-time", role: "timer" });
  const actions = h("div", { class: "dialog-actions" }, time);
  if (kinds.includes("image")) {
    actions.append(textButton("camera", "Take a photo", async () => {
      const canvas = h("canvas", { width: preview.videoWidth, height: preview.videoHeight });
      canvas.getContext("2d").drawImage(preview, 0, 0);
      const blob = await new Promise((resolve) => canvas.toBlob(resolve, "image/png"));
      onfile(file(blob, "Photo", "image/png"));
      dialog.close();
    }, { class: "button button-primary" }));
  }
  let recording = null;
  if (kinds.includes("video")) {
    const button = textButton("film", "Record a clip", () => {
      if (recording) return recording.stop();
      recording = record(stream, VIDEO_TYPES, "Clip", time, (made) => {
        onfile(made);
        dialog.close();
      });
      button.lastChild.textContent = "Stop";
      announce("Recording.");
    });
    actions.append(button);
  }
  const dialog = openDialog("Camera", [preview, actions], {
    onclose: () => {
      recording?.cancel();
      stopAll(stream);
    },
  });
}

/** Open the microphone. */
export async function openMicrophone(onfile) {
  const stream = await devices({ audio: true });
  if (!stream) return;
  const time = h("span", { class: "record-time", role: "timer" }, "0:00");
  const meter = h("div", { class: "meter", "aria-hidden": "true" }, Array.from({ length: 24 }, () => h("i")));
  const listening = listen(stream, meter);
  const recording = record(stream, AUDIO_TYPES, "Sound", time, (made) => {
    onfile(made);
    dialog.close();
  });
  const stop = textButton("stop", "Stop and use it", () => recording.stop(), { class: "button button-primary" });
  const dialog = openDialog("Microphone", [h("div", { class: "record-row" }, icon("mic"), meter, time), h("div", { class: "dialog-actions" }, stop)], {
    onclose: () => {
      recording.cancel();
      listening();
      stopAll(stream);
    },
  });
  stop.focus();
  announce("Recording.");
}

function record(stream, types, name, time, ondone) {
  const mimeType = types.find((type) => MediaRecorder.isTypeSupported(type));
  const recorder = new MediaRecorder(stream, mimeType ? { mimeType } : {});
  const pieces = [];
  const began = Date.now();
  let wanted = true;
  const timer = setInterval(() => {
    const seconds = (Date.now() - began) / 1000;
    time.textContent = `${clock(seconds)} of ${clock(MOST_SECONDS)}`;
    if (seconds >= MOST_SECONDS) stop();
  }, 250);
  const stop = () => recorder.state !== "inactive" && recorder.stop();
  recorder.ondataavailable = (event) => pieces.push(event.data);
  recorder.onstop = () => {
    clearInterval(timer);
    if (!wanted) return;
    const type = recorder.mimeType.split(";")[0];
    ondone(file(new Blob(pieces, { type }), name, type));
  };
  recorder.start();
  return {
    stop,
    cancel: () => {
      wanted = false;
      clearInterval(timer);
      stop();
    },
  };
}

/** Show how loud it is; return a function that ends it. */
function listen(stream, meter) {
  const context = new AudioContext();
  const analyser = context.createAnalyser();
  analyser.fftSize = 256;
  context.createMediaStreamSource(stream).connect(analyser);
  const samples = new Uint8Array(analyser.fftSize);
  const levels = new Array(meter.children.length).fill(0);
  const timer = setInterval(() => {
    analyser.getByteTimeDomainData(samples);
    const loud = samples.reduce((most, sample) => Math.max(most, Math.abs(sample - 128)), 0) / 128;
    levels.push(loud);
    levels.shift();
    levels.forEach((level, i) => meter.children[i].style.setProperty("--level", level.toFixed(2)));
  }, 80);
  return () => {
    clearInterval(timer);
    context.close();
  };
}

function stopAll(stream) {
  for (const track of stream.getTracks()) track.stop();
}
