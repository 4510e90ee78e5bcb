// Building of DOM nodes. Nothing here, or anywhere on the page, turns text into markup.

import { ICONS } from "./icons.js";

const SVG = "http://www.w3.org/2000/svg";

/**
 * Return an element. `props`: attributes; `on…` are listeners, `data` a dataset, `class` a list of
 * names or a text; null, undefined and false leave an attribute out. Children: nodes, texts, lists of
 * them, or nothing.
 */
export function h(tag, props = {}, ...children) {
  const element = document.createElement(tag);
  apply(element, props);
  append(element, children);
  return element;
}

/** Return an SVG element. */
export function svg(tag, props = {}, ...children) {
  const element = document.createElementNS(SVG, tag);
  apply(element, props);
  append(element, children);
  return element;
}

function apply(element, props) {
  for (const [name, value] of Object.entries(props)) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name === "data") Object.assign(element.dataset, value);
    else if (name === "class") element.setAttribute("class", [value].flat().filter(Boolean).join(" "));
    else if (name === "value" || name === "checked" || name === "srcObject") element[name] = value;
    else element.setAttribute(name, value === true ? "" : String(value));
  }
}

function append(element, children) {
  for (const child of children.flat(Infinity)) {
    if (child === null || child === undefined || child === false) continue;
    element.append(child);
  }
}

/** Return an icon, hidden from screen readers: what it means stands beside it or in a label. */
export function icon(name) {
  const shapes = ICONS[name].map((d) => svg("path", { d }));
  return svg("svg", { viewBox: "0 0 24 24", class: "icon", "aria-hidden": "true", focusable: "false" }, shapes);
}

/** Return a button that shows an icon alone and is called `label`. */
export function iconButton(name, label, onclick, props = {}) {
  return h("button", { type: "button", class: "icon-button", "aria-label": label, title: label, onclick, ...props }, icon(name));
}

/** Return a button with an icon and a text. */
export function textButton(name, text, onclick, props = {}) {
  return h("button", { type: "button", class: "button", onclick, ...props }, name && icon(name), h("span", {}, text));
}

export function byId(id) {
  return document.getElementById(id);
}

/** Say something to screen readers. */
export function announce(text) {
  const region = byId("announcer");
  region.textContent = "";
  // Emptied first, so that the same words are said again.
  requestAnimationFrame(() => (region.textContent = text));
}

/** Show a message for a while, and say it. */
export function toast(text, { error = false } = {}) {
  const place = byId("toasts");
  const close = () => note.remove();
  const note = h("div", { class: ["toast", error && "toast-error"], role: error ? "alert" : "status" },
    h("span", {}, text), iconButton("close", "Close this message", close));
  place.append(note);
  while (place.children.length > 3) place.firstChild.remove();
  setTimeout(close, error ? 12000 : 4000);
}

/** Put a text on the clipboard, and say so. */
export async function copyText(text, what) {
  try {
    await navigator.clipboard.writeText(text);
    toast(`${what} copied.`);
  } catch {
    toast(`The browser did not allow copying. ${what} can be selected and copied by hand.`, { error: true });
  }
}

/** Offer a text or a Blob as a file. */
export function download(name, content, type = "application/json") {
  const url = URL.createObjectURL(content instanceof Blob ? content : new Blob([content], { type }));
  const link = h("a", { href: url, download: name });
  document.body.append(link);
  link.click();
  link.remove();
  setTimeout(() => URL.revokeObjectURL(url), 60000);
}

/** Open a dialog with a title; return it. It removes itself when it is closed. */
export function openDialog(title, body, { wide = false, onclose } = {}) {
  const heading = h("h2", { id: "dialog-title" }, title);
  const dialog = h("dialog", { class: ["dialog", wide && "dialog-wide"], "aria-labelledby": "dialog-title" },
    h("header", { class: "dialog-head" }, heading, iconButton("close", "Close", () => dialog.close())),
    h("div", { class: "dialog-body" }, body));
  dialog.addEventListener("click", (event) => event.target === dialog && dialog.close());
  dialog.addEventListener("close", () => {
    dialog.remove();
    onclose?.();
  });
  document.body.append(dialog);
  dialog.showModal();
  return dialog;
}

/** Ask for a yes; resolve to true or false. */
export function confirmDialog(title, text, action) {
  return new Promise((resolve) => {
    let answer = false;
    const yes = textButton(null, action, () => {
      answer = true;
      dialog.close();
    }, { class: "button button-danger" });
    const no = textButton(null, "Cancel", () => dialog.close());
    const dialog = openDialog(title, [h("p", {}, text), h("div", { class: "dialog-actions" }, no, yes)], {
      onclose: () => resolve(answer),
    });
    no.focus();
  });
}
