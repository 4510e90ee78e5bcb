// The chat: one conversation on the page, and at most one answer that is being written.

import { stream } from "../lib/api.js";
import { announce, h, iconButton } from "../lib/dom.js";
import { count } from "../lib/format.js";
import { getSettings } from "../lib/settings.js";
import { dataUrl } from "../lib/store.js";
import { Composer, acceptDrops } from "./composer.js";
import { addMessage, newConversation, newId, path, showBranch, siblings } from "./conversation.js";
import { exampleCards } from "./examples.js";
import { Urls, inWords, kindsOf } from "./media.js";
import { AnswerView, userView } from "./message.js";
import { attachmentAt, chatBody } from "./request.js";
import { tokensOf } from "./tokens.js";

const LOGO = new URL("../../icon.svg", import.meta.url).href;
const SAID = 600; // characters of an answer that are told to screen readers

/** `on`: {changed(), unauthorized(), code(messages)}. */
export class Chat {
  #running = null; // {conversation, message, abort}
  #view = null; // that of the answer that is being written, while it is shown

  constructor({ store, on }) {
    Object.assign(this, { store, on, facts: null, model: "" });
    this.urls = new Urls(store);
    this.conversation = newConversation();
    this.list = h("div", { class: "messages" });
    this.scroller = h("div", { class: "scroller", tabindex: "0", role: "region", "aria-label": "Conversation" }, this.list);
    this.latest = iconButton("down", "Show the latest", () => this.#scroll(true), { class: "icon-button latest", hidden: true });
    this.composer = new Composer({
      store,
      urls: this.urls,
      on: {
        send: (text, attachments) => this.#send(text, attachments),
        stop: () => this.stop(),
        editLast: () => this.#editLast(),
      },
    });
    this.element = h("section", { class: "chat", "aria-label": "Chat" }, this.scroller,
      h("div", { class: "composer-place" }, this.latest, this.composer.element));
    this.scroller.addEventListener("scroll", () => (this.latest.hidden = this.#atEnd()), { passive: true });
    // Pictures and frames come later than their messages: what was at its end stays there.
    new ResizeObserver(() => this.#scroll(false)).observe(this.list);
    acceptDrops(this.element, this.composer);
  }

  setFacts(facts) {
    this.facts = facts;
    this.composer.setFacts(facts);
    this.show();
  }

  get isRunning() {
    return this.#running !== null;
  }

  open(conversation) {
    if (conversation.id !== this.conversation.id) this.urls.release();
    this.conversation = conversation;
    this.show();
    this.#scroll(true);
    this.composer.focus();
  }

  startNew() {
    this.open(newConversation());
  }

  /** Show the branch of the conversation. */
  show() {
    const messages = path(this.conversation);
    const actions = {
      edit: (message, text) => this.#edit(message, text),
      retry: (message) => this.#retry(message),
      branch: (message) => this.#branch(message),
      show: (message) => this.#showBranch(message),
      code: (message) => this.on.code(path(this.conversation, message.parent)),
    };
    this.#view = null;
    const views = messages.map((message, index) => {
      const options = { siblings: siblings(this.conversation, message), actions };
      if (message.role === "user") {
        const items = messages[index + 1]?.answer?.metrics?.items ?? [];
        return userView(message, { ...options, urls: this.urls, items });
      }
      const running = this.#running?.message === message;
      const view = new AnswerView(message, { ...options, running });
      if (running) {
        this.#view = view;
        view.onwritten = () => this.#scroll(false);
      }
      return view.element;
    });
    this.list.replaceChildren(...(views.length ? views : [this.#welcome()]));
    this.composer.setRunning(this.#running !== null);
    this.latest.hidden = this.#atEnd();
  }

  #welcome() {
    if (!this.facts) return h("div", { class: "welcome" });
    const { max_model_len: context, loaded } = this.facts;
    const kinds = kindsOf(this.facts);
    const takes = loaded
      ? `${this.model} understands text${kinds.length ? ` and ${inWords(kinds)}` : ""}, up to ${count(context)} tokens.`
      : `${this.model} is loaded with the first message, which takes a while.`;
    return h("div", { class: "welcome" }, h("img", { src: LOGO, alt: "", width: 56, height: 56 }), h("h2", {}, "What would you like to know?"),
      h("p", {}, takes),
      exampleCards(this.facts, async (example) => {
        if (example.file) await this.composer.addFiles([await example.file()]);
        this.composer.setText(example.text);
        this.composer.focus();
      }));
  }

  stop() {
    this.#running?.abort.abort();
  }

  /** Let go of a conversation that is removed, or of all for null: its answer stops. */
  forget(id) {
    if (id === null || id === this.#running?.conversation.id) this.stop();
    if (id === null || id === this.conversation.id) this.startNew();
  }

  #send(text, attachments) {
    addMessage(this.conversation, this.conversation.leaf, "user", text, attachments);
    this.#answer();
  }

  #edit(message, text) {
    if (this.#running || (!text.trim() && !message.attachments.length)) return;
    addMessage(this.conversation, message.parent, "user", text.trim(), message.attachments);
    this.#answer();
  }

  #retry(message) {
    if (this.#running) return;
    this.conversation.leaf = message.parent;
    this.#answer();
  }

  #showBranch(message) {
    showBranch(this.conversation, message);
    this.store.save(this.conversation);
    this.show();
    this.list.querySelector(`[data-id="${message.id}"] .branches button:not([disabled])`)?.focus();
  }

  #branch(message) {
    const copy = structuredClone({ ...this.conversation, messages: {} });
    const chain = path(this.conversation, message.id);
    Object.assign(copy, { id: newId(), created: Date.now(), updated: Date.now(), leaf: message.id });
    for (const one of chain) copy.messages[one.id] = structuredClone(one);
    this.store.save(copy);
    this.open(copy);
    this.on.changed();
    announce("Branched into a new conversation.");
  }

  #editLast() {
    const last = path(this.conversation).filter((message) => message.role === "user").at(-1);
    const button = last && this.list.querySelector(`[data-id="${last.id}"] [aria-label="Edit the message"]`);
    button?.click();
    return Boolean(button);
  }

  /** Ask the server for the next message of the branch. */
  async #answer() {
    const { conversation } = this;
    const messages = path(conversation);
    const message = addMessage(conversation, conversation.leaf, "assistant", "");
    message.answer = { model: this.model };
    conversation.model = this.model;
    const running = { conversation, message, abort: new AbortController() };
    this.#running = running;
    this.show();
    this.#scroll(true);
    this.store.save(conversation).then(() => this.on.changed());
    const places = new Map();
    try {
      await this.#write(running, await this.#body(messages, places));
      announce(`Answer: ${message.text.slice(0, SAID)}`);
    } catch (error) {
      this.#fail(message, error, messages, places);
    }
    this.#place(message, places);
    this.#running = null;
    const view = this.#view;
    if (view?.message === message) {
      const [, user] = [...this.list.children].slice(-2).reverse();
      view.finish();
      this.#showFrames(message, user);
      this.#scroll(false);
    }
    this.composer.setRunning(false);
    if (this.store.get(conversation.id)) await this.store.save(conversation); // else removed meanwhile
    this.on.changed();
  }

  async #body(messages, places) {
    const attachments = messages.flatMap((message) => message.attachments);
    const urls = new Map();
    for (const attachment of attachments) {
      const blob = await this.store.file(attachment.file);
      if (!blob) throw new Error(`${attachment.name} is no longer kept in this browser. Attach it again.`);
      urls.set(attachment.id, await dataUrl(blob, attachment.type));
    }
    return chatBody({ ...this.parameters(), messages }, (attachment) => urls.get(attachment.id), places);
  }

  /** Return the messages of a request that asks for the next answer, or for the last one again. */
  messagesForCode() {
    const messages = path(this.conversation);
    while (messages.at(-1)?.role === "assistant") messages.pop();
    return messages.length ? messages : [{ role: "user", text: this.composer.field.value || "Hello!", attachments: [] }];
  }

  /** Return what a request has besides its messages. */
  parameters() {
    const { sampling, logprobs, system } = getSettings();
    return { model: this.model, system, settings: sampling, logprobs };
  }

  async #write({ message, abort }, body) {
    const { answer } = message;
    const began = performance.now();
    const seconds = () => (performance.now() - began) / 1000;
    for await (const chunk of stream("v1/chat/completions", body, abort.signal)) {
      const choice = chunk.choices?.[0];
      if (chunk.usage) answer.usage = chunk.usage;
      if (chunk.metrics) answer.metrics = chunk.metrics;
      if (!choice) continue;
      const { content, reasoning_content: reasoning, tool_calls: calls } = choice.delta ?? {};
      if ((content || reasoning || calls) && !answer.client) answer.client = { first: seconds() };
      if (answer.client) answer.client.total = seconds();
      if (content) message.text += content;
      if (reasoning) answer.reasoning = (answer.reasoning ?? "") + reasoning;
      for (const call of calls ?? []) addCall(answer, call);
      if (choice.logprobs?.content) (answer.tokens ??= []).push(...tokensOf(choice.logprobs.content));
      if (choice.finish_reason) answer.finish = choice.finish_reason;
      if (this.#view?.message === message) this.#view.write();
    }
  }

  #fail(message, error, messages, places) {
    if (error.name === "AbortError") {
      message.answer.finish = "stopped";
      announce("Stopped.");
      return;
    }
    const id = attachmentAt(places, error.param);
    const attachment = messages.flatMap((m) => m.attachments).find((one) => one.id === id);
    message.answer.error = { message: attachment ? `${attachment.name}: ${error.message}` : error.message };
    if (error.status === 401) this.on.unauthorized();
  }

  /** Note in the metrics of an answer which attachment each item was; frames of earlier turns are there already. */
  #place(message, places) {
    for (const item of message.answer.metrics?.items ?? []) {
      item.attachment = attachmentAt(places, item.param) ?? places.get(item.param) ?? null;
    }
  }

  #showFrames(message, view) {
    const user = this.conversation.messages[message.parent];
    const items = message.answer.metrics?.items ?? [];
    if (!user || !view || !items.some((item) => item.frames?.length)) return;
    const actions = { edit: (m, text) => this.#edit(m, text), branch: (m) => this.#branch(m), show: (m) => this.#showBranch(m) };
    view.replaceWith(userView(user, { urls: this.urls, siblings: siblings(this.conversation, user), actions, items }));
  }

  #atEnd() {
    const { scrollHeight, scrollTop, clientHeight } = this.scroller;
    return scrollHeight - scrollTop - clientHeight < 80;
  }

  /** Show the end, always or when it was shown before. */
  #scroll(always) {
    if (always || this.latest.hidden) this.scroller.scrollTop = this.scroller.scrollHeight;
    this.latest.hidden = this.#atEnd();
  }
}

function addCall(answer, { index, function: called = {} }) {
  answer.calls ??= [];
  const call = (answer.calls[index ?? 0] ??= { name: "", arguments: "" });
  call.name += called.name ?? "";
  call.arguments += called.arguments ?? "";
}
