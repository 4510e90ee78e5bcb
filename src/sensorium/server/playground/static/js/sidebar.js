// The list of conversations, and what can be done with all of them.

import { confirmDialog, download, h, iconButton, toast } from "./lib/dom.js";
import { ago, counted } from "./lib/format.js";
import { parseExport } from "./chat/conversation.js";

const MOST_BYTES = 1_000_000_000;

/** `on`: {open(conversation), removed(id)}. */
export class Sidebar {
  constructor({ store, on }) {
    Object.assign(this, { store, on, current: null });
    this.list = h("ul", { class: "conversations", "aria-label": "Conversations" });
    this.picker = h("input", { type: "file", accept: "application/json,.json", hidden: true, "aria-label": "File of conversations", onchange: () => this.#import() });
    this.tools = h("div", { class: "sidebar-tools" }, this.picker,
      iconButton("download", "Export all conversations", () => this.#export(this.store.conversations)),
      iconButton("upload", "Import conversations", () => this.picker.click()),
      iconButton("trash", "Remove all conversations", () => this.#clear()));
  }

  show(current = this.current) {
    this.current = current;
    const { conversations } = this.store;
    this.list.replaceChildren(...conversations.map((conversation) => this.#item(conversation)));
    if (!conversations.length) this.list.append(h("li", { class: "hint" }, "Conversations are kept in this browser alone."));
  }

  #item(conversation) {
    const title = conversation.title || "Untitled";
    const isCurrent = conversation.id === this.current;
    return h("li", { class: isCurrent ? "is-current" : null },
      h("button", { type: "button", class: "conversation", "aria-current": isCurrent ? "true" : null, onclick: () => this.on.open(conversation) },
        h("span", { class: "conversation-title" }, title), h("span", { class: "hint" }, ago(conversation.updated))),
      iconButton("download", `Export ${title}`, () => this.#export([conversation])),
      iconButton("trash", `Remove ${title}`, () => this.#remove(conversation, title)));
  }

  async #remove(conversation, title) {
    if (!(await confirmDialog("Remove the conversation?", `“${title}” is removed from this browser. That cannot be undone.`, "Remove"))) return;
    await this.store.remove(conversation.id);
    this.on.removed(conversation.id);
  }

  async #clear() {
    const { conversations } = this.store;
    if (!conversations.length) return this.store.clear(); // files without a conversation
    const text = `${counted(conversations.length, "conversation")} will be removed from this browser. That cannot be undone.`;
    if (!(await confirmDialog("Remove all conversations?", text, "Remove all"))) return;
    await this.store.clear();
    this.on.removed(null);
  }

  async #export(conversations) {
    if (!conversations.length) return toast("There are no conversations yet.");
    const stamp = new Date().toISOString().slice(0, 10);
    download(`sensorium-conversations-${stamp}.json`, await this.store.exported(conversations));
  }

  async #import() {
    const [file] = this.picker.files;
    this.picker.value = "";
    if (!file) return;
    if (file.size > MOST_BYTES) return toast("The file is larger than 1 GB.", { error: true });
    try {
      const found = parseExport(await file.text());
      await this.store.adopt(found);
      toast(`${counted(found.conversations.length, "conversation")} imported.`);
      this.show();
    } catch (error) {
      toast(error.message, { error: true });
    }
  }
}
