// The page: facts of the server, the views, and what belongs to all of them.

import { getJson } from "./lib/api.js";
import { announce, byId, h, icon, iconButton, textButton, toast } from "./lib/dom.js";
import { applyTheme, changeSettings, getSettings } from "./lib/settings.js";
import { Store } from "./lib/store.js";
import { Chat } from "./chat/chat.js";
import { EmbedView } from "./embed.js";
import { openCode, openKeys, openSettings } from "./panels.js";
import { ServerView } from "./server.js";
import { Sidebar } from "./sidebar.js";

applyTheme();
const store = await Store.load();
store.onfull = () => toast("The browser has no room for more: what is new is lost with this tab. Remove old conversations, or export them.", { error: true });

let facts = null;
const views = {};
const sidebar = new Sidebar({ store, on: { open: openConversation, removed } });
const chat = new Chat({ store, on: { changed, unauthorized: askForKey, code: showCode } });
views.chat = chat;
views.server = new ServerView();
let current = null;
let asked = false; // for the key, since the last one

build();
await loadFacts();
addEventListener("hashchange", () => show(viewOfHash()));
addEventListener("keydown", onKey);

function build() {
  const links = [["chat", "chat", "Chat"], ["embed", "vector", "Embed"], ["server", "pulse", "Server"]];
  byId("navigation").append(...links.map(([name, sign, label]) => h("a", { href: `#${name}`, data: { view: name }, hidden: name === "embed" }, icon(sign), h("span", {}, label))));
  byId("new-place").append(textButton("plus", "New conversation", startNew, { class: "button new-button" }));
  byId("conversations").append(sidebar.list);
  byId("sidebar-foot").append(sidebar.tools, iconButton("keyboard", "Keys", openKeys));
  byId("top-start").append(iconButton("menu", "Conversations and views", () => toggleSidebar(), { class: "icon-button menu-button", "aria-expanded": "false", "aria-controls": "sidebar" }));
  byId("top-end").append(
    iconButton("code", "Show the request as code", () => showCode(), { data: { only: "chat" } }),
    iconButton("sliders", "Settings", () => openSettings(facts, loadFacts)));
  byId("veil").addEventListener("click", () => toggleSidebar(false));
  sidebar.show(chat.conversation.id);
}

/** Ask the server what it is, and what the chosen model is. Until it answers, the page says why it does not. */
async function loadFacts() {
  const chosen = getSettings().model;
  try {
    facts = withDefaults(await getJson(chosen ? `playground/facts?model=${encodeURIComponent(chosen)}` : "playground/facts"));
  } catch (error) {
    if (chosen && error.status === 404) {
      changeSettings({ model: "" }); // it is not served here any more
      await loadFacts();
      return;
    }
    byId("model").textContent = error.message;
    byId("model").classList.add("is-bad");
    if (error.status === 401) askForKey();
    show(viewOfHash());
    return;
  }
  document.title = `${facts.model} – Sensorium`;
  const pools = facts.runner === "pooling";
  const model = byId("model");
  model.classList.remove("is-bad");
  model.replaceChildren(facts.models.length > 1 ? modelChoice() : h("b", {}, facts.model), h("span", { class: "takes" }, facts.modalities.map((name) => h("span", {}, name))));
  if (pools) views.embed ??= new EmbedView({ unauthorized: askForKey });
  document.body.classList.toggle("pools", pools);
  document.body.classList.toggle("several", facts.models.length > 1);
  document.querySelector("[data-view=embed]").hidden = !pools;
  document.querySelector("[data-view=chat]").hidden = pools;
  chat.model = facts.model;
  for (const view of Object.values(views)) view.setFacts(facts);
  show(viewOfHash());
}

/** Fill in what is not known of a model before it is loaded: it may take anything, unless its files say what. */
function withDefaults(found) {
  const loaded = found.max_model_len !== null;
  return { ...found, loaded, modalities: found.modalities ?? ["text", "image", "video", "audio"] };
}

/** Return the models to choose from, each with its state unless it is ready. */
function modelChoice() {
  const options = facts.models.map(({ name, state }) => h("option", { value: name, selected: name === facts.root }, state === "ready" ? name : `${name} (${state})`));
  return h("select", { "aria-label": "Model", class: "model-choice", onchange: (event) => choose(event.target.value) }, options);
}

async function choose(name) {
  changeSettings({ model: name });
  await loadFacts();
  announce(`Model: ${facts.model}`);
}

/** Choose the model of a conversation, if it is another one that is served here. */
function chooseFor({ model }) {
  if (model !== facts?.root && facts?.models.some(({ name }) => name === model)) choose(model);
}

/** Show what has changed in a conversation, and what the first answer told of a model that it loaded. */
function changed() {
  sidebar.show(chat.conversation.id);
  if (facts && !facts.loaded && !chat.isRunning) loadFacts();
}

function viewOfHash() {
  const home = facts?.runner === "pooling" ? "embed" : "chat";
  const name = location.hash.slice(1);
  if (name === "server") return name;
  return home;
}

function show(name) {
  const view = views[name];
  toggleSidebar(false);
  for (const link of document.querySelectorAll("#navigation a")) {
    if (link.dataset.view === name) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  for (const node of document.querySelectorAll("[data-only]")) node.hidden = node.dataset.only !== name;
  if (view === current) return;
  if (current === views.server) current.stop();
  byId("view").replaceChildren(view.element);
  current = view;
  if (name === "server") view.start();
  if (name === "chat") view.composer.focus();
}

function openConversation(conversation) {
  location.hash = "#chat";
  show("chat");
  chat.open(conversation);
  chooseFor(conversation);
  sidebar.show(conversation.id);
}

function startNew() {
  location.hash = "#chat";
  show("chat");
  chat.startNew();
  sidebar.show(chat.conversation.id);
}

function removed(id) {
  chat.forget(id);
  sidebar.show(chat.conversation.id);
}

function askForKey() {
  if (asked || document.querySelector("dialog[open]")) return;
  asked = true;
  openSettings(facts, () => {
    asked = false;
    loadFacts();
  }, { focusKey: true });
}

function showCode(messages = null) {
  openCode({ ...chat.parameters(), messages: messages ?? chat.messagesForCode() });
}

function toggleSidebar(open = !document.body.classList.contains("sidebar-open")) {
  const button = document.querySelector(".menu-button");
  const was = document.body.classList.contains("sidebar-open");
  document.body.classList.toggle("sidebar-open", open);
  button?.setAttribute("aria-expanded", open);
  if (open) byId("sidebar").querySelector("a, button").focus();
  else if (was && byId("sidebar").contains(document.activeElement)) button.focus();
}

function onKey(event) {
  const typing = event.target.closest?.("input, textarea, select, [contenteditable]");
  const inDialog = document.querySelector("dialog[open]");
  if (inDialog) return;
  if (event.key === "Escape") {
    if (document.body.classList.contains("sidebar-open")) toggleSidebar(false);
    else if (chat.isRunning) chat.stop();
  } else if (event.ctrlKey && event.shiftKey && event.key.toLowerCase() === "o") {
    event.preventDefault();
    startNew();
  } else if (event.ctrlKey && event.key === ",") {
    event.preventDefault();
    openSettings(facts, loadFacts);
  } else if (!typing && event.key === "/" && current === chat) {
    event.preventDefault();
    chat.composer.focus();
  } else if (!typing && event.key === "?") {
    event.preventDefault();
    openKeys();
  }
}

if (!store.persistent) announce("This browser keeps no conversations.");
