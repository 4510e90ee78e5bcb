// The field for messages: text, files that are picked, dropped, pasted or recorded, and send or stop.

import { announce, h, iconButton, toast } from "../lib/dom.js";
import { bytes } from "../lib/format.js";
import { newId } from "./conversation.js";
import { acceptOf, inWords, kindOf, kindsOf, nameOf, trayItem, typeOf } from "./media.js";
import { openCamera, openMicrophone } from "./recorder.js";

const MOST_FILES = 32;

/** `on`: {send(text, attachments), stop(), editLast()}. */
export class Composer {
  #attachments = [];
  #facts = { modalities: ["text"], documents: false, max_body_bytes: Infinity };

  constructor({ store, urls, on }) {
    Object.assign(this, { store, urls, on });
    this.field = h("textarea", {
      rows: 1, placeholder: "Ask something", "aria-label": "Message", "aria-describedby": "composer-hint",
      oninput: () => this.#resize(), onkeydown: (event) => this.#key(event), onpaste: (event) => this.#paste(event),
    });
    this.picker = h("input", {
      type: "file", multiple: true, hidden: true, "aria-label": "Files to attach",
      onchange: () => {
        this.addFiles([...this.picker.files]);
        this.picker.value = "";
      },
    });
    this.tray = h("ul", { class: "tray", "aria-label": "Attached files", hidden: true });
    this.attach = iconButton("attach", "Attach files", () => this.picker.click());
    this.camera = iconButton("camera", "Use the camera", () => openCamera(this.kinds, this.kinds.includes("audio"), (file) => this.addFiles([file])));
    this.mic = iconButton("mic", "Record a sound", () => openMicrophone((file) => this.addFiles([file])));
    this.send = iconButton("send", "Send", () => this.#submit(), { class: "icon-button send" });
    this.stop = iconButton("stop", "Stop the answer", () => on.stop(), { class: "icon-button send stop", hidden: true });
    this.hint = h("span", { id: "composer-hint", class: "hint composer-hint" });
    this.element = h("div", { class: "composer" }, this.tray, this.field,
      h("div", { class: "composer-row" }, this.picker, this.attach, this.camera, this.mic, this.hint, this.send, this.stop));
    this.setFacts(this.#facts);
  }

  get kinds() {
    return kindsOf(this.#facts);
  }

  /** Show what the model takes, and nothing else. */
  setFacts(facts) {
    this.#facts = facts;
    const { kinds } = this;
    this.attach.hidden = !kinds.length;
    this.camera.hidden = !kinds.includes("image") && !kinds.includes("video");
    this.mic.hidden = !kinds.includes("audio");
    this.picker.accept = acceptOf(kinds);
    this.hint.textContent = kinds.length ? `Drop or paste ${inWords(kinds)}` : "";
  }

  setRunning(running) {
    const had = document.activeElement === this.send || document.activeElement === this.stop;
    this.send.hidden = running;
    this.stop.hidden = !running;
    if (had) (running ? this.stop : this.field).focus();
  }

  focus() {
    this.field.focus();
  }

  setText(text) {
    this.field.value = text;
    this.#resize();
  }

  /** Attach files: those that the model cannot take are named in a message. */
  async addFiles(files) {
    for (const file of files) {
      const kind = kindOf(file);
      const reason = this.#refusal(file, kind);
      if (reason) {
        toast(reason, { error: true });
        continue;
      }
      const type = typeOf(file, kind);
      const id = await this.store.addFile(file.slice(0, file.size, type));
      this.store.held.add(id);
      const name = file.name || `Pasted ${nameOf(kind)}`;
      this.#attachments.push({ id: newId(), kind, name, type, size: file.size, file: id });
      announce(`${name} attached.`);
      this.#showTray();
    }
    this.focus();
  }

  #refusal(file, kind) {
    const name = file.name || "The file";
    const { kinds } = this;
    if (!kind || !kinds.includes(kind)) {
      const what = kind ? `no ${nameOf(kind) === "PDF" ? "PDFs" : `${nameOf(kind)}s`}` : "no such files";
      return `${name}: this model takes ${what}${kinds.length ? `, only text, ${inWords(kinds)}` : ", only text"}.`;
    }
    if (!file.size) return `${name} is empty.`;
    const total = this.#attachments.reduce((sum, { size }) => sum + size, file.size);
    if (1.37 * total > this.#facts.max_body_bytes) return `${name}: together the files are too large for one request (${bytes(this.#facts.max_body_bytes)}).`;
    if (this.#attachments.length >= MOST_FILES) return `At most ${MOST_FILES} files go into one message.`;
    return null;
  }

  #showTray() {
    this.tray.hidden = !this.#attachments.length;
    this.tray.replaceChildren(...this.#attachments.map((attachment) => trayItem(attachment, this.urls, () => {
      this.store.discard(attachment.file);
      this.#attachments = this.#attachments.filter((other) => other !== attachment);
      this.#showTray();
      this.focus();
    })));
  }

  #submit() {
    const text = this.field.value.trim();
    if (this.send.hidden || (!text && !this.#attachments.length)) return;
    const attachments = this.#attachments;
    this.#attachments = [];
    this.field.value = "";
    this.#resize();
    this.#showTray();
    this.on.send(text, attachments);
    for (const { file } of attachments) this.store.held.delete(file);
  }

  #key(event) {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
      event.preventDefault();
      this.#submit();
    } else if (event.key === "ArrowUp" && !this.field.value && !this.#attachments.length) {
      if (this.on.editLast()) event.preventDefault();
    }
  }

  #paste(event) {
    const files = [...(event.clipboardData?.files ?? [])];
    if (!files.length) return;
    event.preventDefault();
    this.addFiles(files);
  }

  #resize() {
    this.field.style.setProperty("height", "auto");
    this.field.style.setProperty("height", `${Math.min(this.field.scrollHeight, 0.4 * innerHeight)}px`);
  }
}

/** Let files be dropped anywhere on `element`. */
export function acceptDrops(element, composer) {
  let depth = 0;
  const veil = h("div", { class: "drop-veil", "aria-hidden": "true", hidden: true }, h("p", {}, "Drop to attach"));
  element.append(veil);
  const hasFiles = (event) => [...(event.dataTransfer?.types ?? [])].includes("Files");
  const show = (change) => {
    depth = Math.max(0, depth + change);
    veil.hidden = depth === 0;
  };
  element.addEventListener("dragenter", (event) => hasFiles(event) && (event.preventDefault(), show(1)));
  element.addEventListener("dragover", (event) => hasFiles(event) && event.preventDefault());
  element.addEventListener("dragleave", (event) => hasFiles(event) && show(-1));
  element.addEventListener("drop", (event) => {
    if (!hasFiles(event)) return;
    event.preventDefault();
    show(-depth);
    composer.addFiles([...event.dataTransfer.files]);
  });
}
