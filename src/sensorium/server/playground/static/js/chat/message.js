// The views of messages.

import { copyText, h, icon, iconButton, textButton } from "../lib/dom.js";
import { GrowingText, Renderer } from "../markdown/render.js";
import { frameStrip } from "./frames.js";
import { attachmentView } from "./media.js";
import { timingView } from "./timing.js";
import { tokensView } from "./tokens.js";

const renderer = new Renderer(document, { onCopy: (text) => copyText(text, "Code") });
const FINISHES = {
  length: "The answer ended at the limit of tokens.",
  stopped: "Stopped.",
  abort: "The server ended this answer.",
};

/** Return the view of a user's message. `actions`: {edit(message, text), branch(message), show(message)}. */
export function userView(message, { urls, siblings, actions, items = [] }) {
  const files = message.attachments.map((attachment) => {
    const item = items.find(({ attachment: id }) => id === attachment.id);
    const view = attachmentView(attachment, urls);
    if (!item?.frames?.length) return view;
    const place = h("div", { class: "attachment-group" }, view);
    urls.get(attachment.file).then((src) => place.append(frameStrip(item, src, attachment.name)));
    return place;
  });
  const body = h("div", { class: "bubble" }, message.text);
  const view = h("article", { class: "message message-user", data: { id: message.id } },
    h("h2", { class: "visually-hidden" }, "You"),
    files.length ? h("div", { class: "attachments" }, files) : null,
    message.text ? body : null,
    h("div", { class: "actions" },
      branches(message, siblings, actions),
      iconButton("copy", "Copy the message", () => copyText(message.text, "Message")),
      iconButton("edit", "Edit the message", () => edit(view, message, actions)),
      iconButton("branch", "Branch into a new conversation", () => actions.branch(message))));
  return view;
}

/** Replace a message by a field for a new text of it; sending it begins a branch. */
function edit(view, message, actions) {
  const field = h("textarea", { "aria-label": "New text of the message", rows: Math.min(12, message.text.split("\n").length + 1) });
  field.value = message.text;
  const end = () => {
    form.replaceWith(...old);
    view.querySelector("[aria-label='Edit the message']")?.focus();
  };
  const form = h("form", {
    class: "edit",
    onsubmit: (event) => {
      event.preventDefault();
      actions.edit(message, field.value);
    },
    onkeydown: (event) => {
      if (event.key === "Escape") end();
      if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
        event.preventDefault();
        form.requestSubmit();
      }
    },
  }, field, h("div", { class: "dialog-actions" }, textButton(null, "Cancel", end),
    h("button", { type: "submit", class: "button button-primary" }, "Send")));
  const old = [...view.querySelectorAll(":scope > .bubble, :scope > .actions")];
  old[0].before(form);
  for (const node of old) node.remove();
  field.focus();
  field.setSelectionRange(field.value.length, field.value.length);
}

function branches(message, siblings, actions) {
  if (siblings.length < 2) return null;
  const at = siblings.findIndex(({ id }) => id === message.id);
  return h("span", { class: "branches", role: "group", "aria-label": "Versions" },
    iconButton("left", "Earlier version", () => actions.show(siblings[at - 1]), { disabled: at === 0 }),
    h("span", {}, `${at + 1} / ${siblings.length}`),
    iconButton("right", "Later version", () => actions.show(siblings[at + 1]), { disabled: at === siblings.length - 1 }));
}

/** The view of an answer, which may still be written. */
export class AnswerView {
  #text;
  #shown = 0;
  #pending = null;

  constructor(message, { siblings, actions, running }) {
    this.message = message;
    this.options = { siblings, actions };
    this.prose = h("div", { class: "prose" });
    this.#text = new GrowingText(this.prose, renderer);
    this.reasoning = h("div", { class: "reasoning-text" });
    this.thinking = h("details", { class: "reasoning", hidden: true }, h("summary", {}, "Reasoning"), this.reasoning);
    this.extra = h("div", { class: "answer-extra" });
    this.element = h("article", { class: "message message-assistant", data: { id: message.id } },
      h("h2", { class: "visually-hidden" }, "Answer"), this.thinking, this.prose, this.extra);
    if (running) this.write();
    else this.finish();
  }

  /** Show what has come of the answer; at most every 60 ms, for a fast model says more than eyes can follow. */
  write() {
    this.element.classList.add("is-running");
    this.element.setAttribute("aria-busy", "true");
    if (this.#pending) return;
    const wait = Math.max(0, 60 - (performance.now() - this.#shown));
    this.#pending = setTimeout(() => {
      this.#pending = null;
      this.#shown = performance.now();
      this.#show();
      this.onwritten?.();
    }, wait);
  }

  #show() {
    const { text, answer = {} } = this.message;
    this.#text.update(text);
    this.thinking.hidden = !answer.reasoning;
    if (answer.reasoning) this.reasoning.textContent = answer.reasoning;
  }

  /** Show the whole answer, what it took, and what can be done with it. */
  finish() {
    clearTimeout(this.#pending);
    this.#pending = null;
    this.element.classList.remove("is-running");
    this.element.removeAttribute("aria-busy");
    this.#show();
    const { message } = this;
    const { answer = {} } = message;
    this.extra.replaceChildren(...[
      callsView(answer.calls),
      answer.error && errorView(answer.error),
      FINISHES[answer.finish] && h("p", { class: "finish" }, FINISHES[answer.finish]),
      !message.text && !answer.error && !answer.calls?.length && !answer.reasoning && answer.finish !== "stopped" && h("p", { class: "finish" }, "The answer is empty."),
      timingView(answer),
      this.#actions(),
    ].filter(Boolean));
  }

  #actions() {
    const { message } = this;
    const { siblings, actions } = this.options;
    const tokens = message.answer?.tokens?.length ? iconButton("tokens", "Show token probabilities", (event) => {
      const pressed = this.element.classList.toggle("shows-tokens");
      event.currentTarget.setAttribute("aria-pressed", pressed);
      this.element.querySelector(".tokens-view")?.remove();
      if (pressed) this.prose.after(tokensView(message.answer.tokens));
    }, { "aria-pressed": "false" }) : null;
    return h("div", { class: "actions" },
      branches(message, siblings, actions),
      iconButton("copy", "Copy the answer", () => copyText(message.text, "Answer")),
      iconButton("retry", "Try again", () => actions.retry(message)),
      iconButton("branch", "Branch into a new conversation", () => actions.branch(message)),
      iconButton("code", "Show the request as code", () => actions.code(message)),
      tokens);
  }
}

function errorView({ message }) {
  return h("div", { class: "error", role: "alert" }, icon("alert"), h("p", {}, message));
}

function callsView(calls) {
  if (!calls?.length) return null;
  return h("div", { class: "calls" }, calls.map((call) => h("div", { class: "code-block" },
    h("div", { class: "code-head" }, h("span", {}, `Calls ${call.name}`)),
    h("pre", { tabindex: "0", role: "region", "aria-label": `Arguments of ${call.name}` }, h("code", {}, indented(call.arguments))))));
}

function indented(text) {
  try {
    return JSON.stringify(JSON.parse(text), null, 2);
  } catch {
    return text;
  }
}
