// Dialogs: settings, the request as code, keys of the keyboard.

import { ROOT, key } from "./lib/api.js";
import { copyText, h, openDialog, textButton } from "./lib/dom.js";
import { applyTheme, changeSettings, getSettings } from "./lib/settings.js";
import { SAMPLING, snippets } from "./chat/request.js";

/** Open the settings. `facts` may be null when the key is wrong; `onkey()` is called for a new key. */
export function openSettings(facts, onkey, { focusKey = false } = {}) {
  const generates = facts?.runner !== "pooling";
  const field = keyField(onkey);
  const dialog = openDialog("Settings", [
    generates && systemField(),
    generates && samplingFields(facts?.sampling ?? {}),
    generates && logprobsField(),
    field,
    themeField(),
  ], { wide: false });
  dialog.classList.add("sheet");
  if (focusKey) field.querySelector("input").focus();
}

function systemField() {
  return h("label", { class: "field" }, h("span", {}, "System prompt"),
    h("textarea", {
      rows: 4, value: getSettings().system, placeholder: "None",
      oninput: (event) => changeSettings({ system: event.target.value }),
    }));
}

function samplingFields(defaults) {
  const inputs = SAMPLING.map((option) => numberField(option, defaults[option.name]));
  const stop = h("textarea", {
    rows: 2, value: getSettings().sampling.stop ?? "", placeholder: "One a line; \\n is a line end",
    oninput: (event) => setSampling("stop", event.target.value || undefined),
  });
  const reset = textButton(null, "Use the model's values", () => {
    changeSettings({ sampling: {} });
    for (const { input } of inputs) input.value = "";
    stop.value = "";
  });
  return h("fieldset", { class: "sampling" }, h("legend", {}, "Sampling"),
    h("div", { class: "field-grid" }, inputs.map(({ view }) => view)),
    h("label", { class: "field" }, h("span", {}, "Stop strings"), stop), reset);
}

function numberField({ name, label, min, max, step, whole }, fallback) {
  const input = h("input", {
    type: "number", min, max, step, inputmode: whole ? "numeric" : "decimal",
    value: getSettings().sampling[name] ?? "", placeholder: fallback ?? "default",
    oninput: (event) => {
      const { value } = event.target;
      const given = value === "" ? undefined : Number(value);
      const wrong = given !== undefined && (!Number.isFinite(given) || given < min || given > max || (whole && !Number.isInteger(given)));
      event.target.setAttribute("aria-invalid", wrong);
      setSampling(name, wrong ? undefined : given);
    },
  });
  return { input, view: h("label", { class: "field" }, h("span", {}, label), input) };
}

function setSampling(name, value) {
  const { [name]: _, ...rest } = getSettings().sampling;
  changeSettings({ sampling: value === undefined ? rest : { ...rest, [name]: value } });
}

function logprobsField() {
  return h("label", { class: "check" },
    h("input", { type: "checkbox", checked: getSettings().logprobs, onchange: (event) => changeSettings({ logprobs: event.target.checked }) }),
    h("span", {}, "Ask for token probabilities", h("small", {}, "Answers then show how sure the model was of each token.")));
}

function keyField(onkey) {
  const input = h("input", { type: "password", value: key.get(), autocomplete: "off", spellcheck: "false", placeholder: "Only where the server asks for one" });
  const keep = h("input", { type: "checkbox", checked: key.isKept() });
  const apply = () => {
    key.set(input.value.trim(), keep.checked);
    onkey();
  };
  input.addEventListener("change", apply);
  keep.addEventListener("change", apply);
  const submit = (event) => {
    event.preventDefault();
    apply();
  };
  return h("form", { class: "field-group", onsubmit: submit }, h("label", { class: "field" }, h("span", {}, "API key"), input),
    h("label", { class: "check" }, keep, h("span", {}, "Keep it in this browser", h("small", {}, "Otherwise it is forgotten with this tab."))));
}

function themeField() {
  const themes = [["auto", "As the system"], ["light", "Light"], ["dark", "Dark"]];
  return h("fieldset", { class: "choice" }, h("legend", {}, "Appearance"), h("div", { class: "segments" }, themes.map(([value, label]) =>
    h("label", {}, h("input", {
      type: "radio", name: "theme", value, checked: getSettings().theme === value,
      onchange: () => {
        changeSettings({ theme: value });
        applyTheme();
      },
    }), h("span", {}, label)))));
}

/** Show a request as curl, Python and JavaScript. */
export function openCode(parameters) {
  const codes = snippets(parameters, ROOT.href, Boolean(key.get()));
  const tabs = [["curl", "curl"], ["python", "Python"], ["javascript", "JavaScript"]];
  const code = h("code");
  const panel = h("pre", { tabindex: "0", role: "tabpanel", id: "code-panel", "aria-labelledby": "code-tab-curl" }, code);
  const buttons = tabs.map(([name, label]) => h("button", {
    type: "button", role: "tab", id: `code-tab-${name}`, "aria-controls": "code-panel", onclick: () => show(name),
  }, label));
  const show = (name) => {
    code.textContent = codes[name];
    panel.setAttribute("aria-labelledby", `code-tab-${name}`);
    tabs.forEach(([other], i) => {
      buttons[i].setAttribute("aria-selected", other === name);
      buttons[i].tabIndex = other === name ? 0 : -1;
    });
  };
  const list = h("div", {
    role: "tablist", "aria-label": "Languages", class: "segments",
    onkeydown: (event) => {
      const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      if (!step) return;
      const next = (buttons.indexOf(document.activeElement) + step + tabs.length) % tabs.length;
      buttons[next].focus();
      show(tabs[next][0]);
    },
  }, buttons);
  show("curl");
  openDialog("The request as code", [
    h("div", { class: "code-bar" }, list, textButton("copy", "Copy", () => copyText(code.textContent, "Code"))), panel,
    h("p", { class: "hint" }, "Files are read from the folder where the code runs."),
  ], { wide: true });
}

const KEYS = [
  ["Enter", "Send the message"],
  ["Shift + Enter", "New line"],
  ["Esc", "Stop the answer"],
  ["↑ in an empty field", "Edit your last message"],
  ["/", "Go to the message field"],
  ["Ctrl + Shift + O", "New conversation"],
  ["Ctrl + ,", "Settings"],
  ["?", "These keys"],
];

export function openKeys() {
  openDialog("Keyboard", h("dl", { class: "keys" }, KEYS.map(([keys, what]) => [h("dt", {}, h("kbd", {}, keys)), h("dd", {}, what)])));
}
