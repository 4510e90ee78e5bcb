// Conversations and their files in the browser: IndexedDB, bounded; the tab's memory where there is none.

import { FORMAT, VERSION, fileIds, newId } from "../chat/conversation.js";

const NAME = "sensorium";
const MOST_CONVERSATIONS = 200;
const MOST_BYTES = 512_000_000;
const SPARED_MS = 24 * 60 * 60 * 1000; // by then another tab has sent what it has attached

function promised(request) {
  return new Promise((resolve, reject) => {
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });
}

function open() {
  return new Promise((resolve, reject) => {
    const request = indexedDB.open(NAME, 1);
    request.onupgradeneeded = () => {
      request.result.createObjectStore("conversations", { keyPath: "id" });
      request.result.createObjectStore("files", { keyPath: "id" });
    };
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
    request.onblocked = () => reject(new Error("blocked"));
  });
}

/** What the browser keeps. `persistent`: it is still there after the tab is closed. */
export class Store {
  #database = null;
  #conversations = new Map();
  #files = new Map(); // id -> {id, blob, size}
  /** Ids of files that no conversation refers to yet. */
  held = new Set();

  /** Read all conversations; files are read when they are shown. */
  static async load() {
    const store = new Store();
    try {
      store.#database = await open();
      for (const one of await promised(store.#table("conversations").getAll())) store.#conversations.set(one.id, one);
      await store.#sweep();
    } catch {
      store.#database = null;
    }
    return store;
  }

  get persistent() {
    return this.#database !== null;
  }

  /** Conversations, the one that changed last first. */
  get conversations() {
    return [...this.#conversations.values()].sort((a, b) => b.updated - a.updated);
  }

  get(id) {
    return this.#conversations.get(id) ?? null;
  }

  #table(name, mode = "readonly") {
    return this.#database.transaction(name, mode).objectStore(name);
  }

  async save(conversation) {
    this.#conversations.set(conversation.id, conversation);
    await this.#write(() => this.#table("conversations", "readwrite").put(conversation));
    await this.#bound();
  }

  async remove(id) {
    const gone = this.conversations.filter((one) => one.id === id);
    this.#conversations.delete(id);
    await this.#write(() => this.#table("conversations", "readwrite").delete(id));
    await this.#sweep(fileIds(gone));
  }

  async clear() {
    for (const { id } of this.conversations) await this.remove(id);
    await this.#sweep();
  }

  /** Let go of a file that was attached and is not wanted any more. */
  async discard(id) {
    this.held.delete(id);
    await this.#sweep(new Set([id]));
  }

  /** Keep a file; return its id. */
  async addFile(blob) {
    const file = { id: newId(), blob, size: blob.size };
    this.#files.set(file.id, file);
    await this.#write(() => this.#table("files", "readwrite").put(file));
    return file.id;
  }

  /** Return a file as a Blob, or null when it is gone. */
  async file(id) {
    if (!this.#files.has(id) && this.#database) {
      const found = await promised(this.#table("files").get(id)).catch(() => null);
      if (found) this.#files.set(id, found);
    }
    return this.#files.get(id)?.blob ?? null;
  }

  /** Do what the browser may refuse, for want of room: what it refuses lives in memory alone. */
  async #write(act) {
    if (!this.#database) return;
    try {
      await promised(act());
    } catch {
      this.onfull?.();
    }
  }

  /** Remove the oldest conversations beyond the bounds. */
  async #bound() {
    let kept = this.conversations;
    while (kept.length > MOST_CONVERSATIONS || (kept.length > 1 && sizeOf(kept) > MOST_BYTES)) {
      const oldest = kept.at(-1);
      this.#conversations.delete(oldest.id);
      await this.#write(() => this.#table("conversations", "readwrite").delete(oldest.id));
      kept = this.conversations;
      await this.#sweep(fileIds([oldest]));
    }
  }

  /**
   * Remove files that no conversation refers to: those in `unwanted`, and all that are older than a day.
   *
   * Other tabs share the database: a younger file may be one that waits there to be sent.
   */
  async #sweep(unwanted = new Set()) {
    const own = new Set([...fileIds(this.conversations), ...this.held]);
    for (const id of this.#files.keys()) if (!own.has(id)) this.#files.delete(id);
    if (!this.#database) return;
    try {
      const used = fileIds(await promised(this.#table("conversations").getAll()));
      for (const id of await promised(this.#table("files").getAllKeys())) {
        if (own.has(id) || used.has(id) || (isYoung(id) && !unwanted.has(id))) continue;
        await this.#write(() => this.#table("files", "readwrite").delete(id));
      }
    } catch {
      // What cannot be read now is removed another time.
    }
  }

  /** Return conversations with their files as the text of an export. */
  async exported(conversations) {
    const files = {};
    for (const id of fileIds(conversations)) {
      const blob = await this.file(id);
      if (blob) files[id] = await dataUrl(blob);
    }
    return JSON.stringify({ format: FORMAT, version: VERSION, conversations, files });
  }

  /** Keep what `parseExport` has read. */
  async adopt({ conversations, files }) {
    for (const [id, { type, base64 }] of files) {
      const blob = new Blob([bytesOf(base64)], { type });
      const file = { id, blob, size: blob.size };
      this.#files.set(id, file);
      await this.#write(() => this.#table("files", "readwrite").put(file));
    }
    for (const conversation of conversations) await this.save(conversation);
  }
}

function isYoung(id) {
  return Date.now() - Number.parseInt(id, 36) < SPARED_MS; // ids begin with the time
}

function sizeOf(conversations) {
  const attachments = conversations.flatMap((c) => Object.values(c.messages).flatMap((m) => m.attachments));
  return attachments.reduce((total, attachment) => total + attachment.size, 0);
}

/** Return a Blob as a data: URL, its media type without parameters. */
export function dataUrl(blob, type = blob.type) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(`data:${type.split(";")[0]};base64,${reader.result.slice(reader.result.indexOf(",") + 1)}`);
    reader.onerror = () => reject(reader.error);
    reader.readAsDataURL(blob);
  });
}

function bytesOf(base64) {
  const text = atob(base64.replace(/\s/g, ""));
  const found = new Uint8Array(text.length);
  for (let i = 0; i < text.length; i += 1) found[i] = text.charCodeAt(i);
  return found;
}
