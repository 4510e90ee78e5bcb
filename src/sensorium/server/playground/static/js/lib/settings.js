// Settings of the page, kept in the browser where it allows that.

const NAME = "sensorium.settings";
const DEFAULTS = { theme: "auto", logprobs: false, sampling: {}, system: "", dimensions: "", model: "" };

let settings = { ...DEFAULTS };
try {
  const kept = JSON.parse(localStorage.getItem(NAME) ?? "{}");
  for (const [name, value] of Object.entries(DEFAULTS)) {
    if (typeof kept[name] === typeof value && kept[name] !== null) settings[name] = kept[name];
  }
} catch {
  settings = { ...DEFAULTS };
}

export function getSettings() {
  return settings;
}

/** Change some settings, keep them, and tell those who listen for `settings` on the document. */
export function changeSettings(changes) {
  settings = { ...settings, ...changes };
  try {
    localStorage.setItem(NAME, JSON.stringify(settings));
  } catch {
    // Full, or not allowed: they last as long as the page.
  }
  document.dispatchEvent(new CustomEvent("settings"));
}

export function applyTheme() {
  const { theme } = settings;
  if (theme === "auto") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = theme;
}
