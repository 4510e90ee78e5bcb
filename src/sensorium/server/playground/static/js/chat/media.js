// Files that people attach: what they are, how they look, and how they are sent.

import { h, icon, iconButton, openDialog } from "../lib/dom.js";
import { bytes } from "../lib/format.js";

const EXTENSIONS = {
  image: ["png", "jpg", "jpeg", "webp", "gif", "bmp", "avif", "tif", "tiff", "heic", "heif"],
  video: ["mp4", "webm", "mkv", "mov", "avi", "m4v"],
  audio: ["wav", "mp3", "flac", "ogg", "oga", "opus", "m4a", "aac", "weba"],
  document: ["pdf"],
};
const NAMES = { image: "image", video: "video", audio: "sound", document: "PDF" };
const PLURALS = { image: "images", video: "videos", audio: "sounds", document: "PDFs" };
const ICONS = { image: "image", video: "film", audio: "sound", document: "file" };

/** Return what a file is for the model, by its type or its name; null if it is no media. */
export function kindOf(file) {
  const type = file.type.split(";")[0];
  if (type === "application/pdf") return "document";
  const [group] = type.split("/");
  if (group === "image" || group === "video" || group === "audio") return group;
  const extension = file.name?.split(".").pop().toLowerCase() ?? "";
  return Object.keys(EXTENSIONS).find((kind) => EXTENSIONS[kind].includes(extension)) ?? null;
}

/** Return the media type to send a file with; a browser may know none. */
export function typeOf(file, kind) {
  if (file.type) return file.type.split(";")[0];
  const extension = file.name?.split(".").pop().toLowerCase() ?? "";
  return kind === "document" ? "application/pdf" : `${kind}/${extension || "octet-stream"}`;
}

/** Return the kinds of files that a model takes. */
export function kindsOf({ modalities, documents }) {
  const kinds = ["image", "video", "audio"].filter((kind) => modalities.includes(kind));
  return documents ? [...kinds, "document"] : kinds;
}

/** Return kinds in words: "images, videos and PDFs". */
export function inWords(kinds) {
  const words = kinds.map((kind) => PLURALS[kind]);
  return words.length > 1 ? `${words.slice(0, -1).join(", ")} and ${words.at(-1)}` : (words[0] ?? "");
}

/** Return the `accept` of a file field. */
export function acceptOf(kinds) {
  return kinds.map((kind) => [kind === "document" ? "application/pdf" : `${kind}/*`, ...EXTENSIONS[kind].map((e) => `.${e}`)].join(",")).join(",");
}

export function nameOf(kind) {
  return NAMES[kind];
}

/** Object URLs of files, made once, and given back when nothing shows them any more. */
export class Urls {
  #urls = new Map();

  constructor(store) {
    this.store = store;
  }

  async get(id) {
    if (!this.#urls.has(id)) {
      const blob = await this.store.file(id);
      if (!blob) return null;
      if (!this.#urls.has(id)) this.#urls.set(id, URL.createObjectURL(blob));
    }
    return this.#urls.get(id);
  }

  release() {
    for (const url of this.#urls.values()) URL.revokeObjectURL(url);
    this.#urls.clear();
  }
}

/** Return the view of an attachment in a message: the image itself, a player, or a card. */
export function attachmentView(attachment, urls) {
  const { kind, name } = attachment;
  const view = h("div", { class: ["attachment", `attachment-${kind}`], data: { attachment: attachment.id } });
  const fall = () => view.replaceChildren(card(attachment));
  if (kind === "document") {
    fall();
    return view;
  }
  urls.get(attachment.file).then((src) => {
    if (!src) {
      view.replaceChildren(card(attachment, "no longer kept in this browser"));
    } else if (kind === "image") {
      const image = h("img", { src, alt: name, loading: "lazy", onerror: fall });
      const open = h("button", { type: "button", class: "image-open", "aria-label": `Enlarge ${name}`, onclick: () => enlarge(src, name) }, image);
      view.replaceChildren(open);
    } else {
      const player = h(kind, { src, controls: true, preload: "metadata", "aria-label": name, playsinline: true, onerror: fall });
      view.replaceChildren(player);
    }
  });
  return view;
}

function card({ kind, name, size }, note = "") {
  return h("div", { class: "file-card" }, icon(ICONS[kind]),
    h("span", { class: "file-name" }, name), h("span", { class: "file-size" }, note || bytes(size)));
}

function enlarge(src, name) {
  openDialog(name, h("img", { src, alt: name, class: "enlarged" }), { wide: true });
}

/** Return the small view of a file that waits in the composer. */
export function trayItem(attachment, urls, onremove) {
  const picture = h("div", { class: "tray-picture" }, icon(ICONS[attachment.kind]));
  if (attachment.kind === "image" || attachment.kind === "video") {
    urls.get(attachment.file).then((src) => {
      if (!src) return;
      const preview = attachment.kind === "image" ? h("img", { src, alt: "" }) : h("video", { src: `${src}#t=0.1`, muted: true, preload: "metadata", "aria-hidden": "true", tabindex: "-1" });
      preview.addEventListener("error", () => preview.replaceWith(icon(ICONS[attachment.kind])));
      picture.replaceChildren(preview);
    });
  }
  return h("li", { class: ["tray-item", `tray-${attachment.kind}`] }, picture,
    h("span", { class: "tray-text" }, h("span", { class: "file-name" }, attachment.name), h("span", { class: "file-size" }, bytes(attachment.size))),
    iconButton("close", `Remove ${attachment.name}`, onremove));
}
