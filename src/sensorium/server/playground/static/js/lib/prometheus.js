// Reading of Prometheus' text format, and what charts need of it.

/** Samples of one scrape, by name and labels; with `model` those of this model, and of the server itself. */
export class Scrape {
  constructor(text, prefix, time, model = null) {
    this.time = time;
    this.samples = new Map();
    for (const line of text.split("\n")) {
      if (!line || line[0] === "#") continue;
      const found = /^([a-zA-Z_:][\w:]*)(?:\{(.*)\})? ([^ ]+)/.exec(line);
      if (!found) continue;
      const name = found[1].startsWith(prefix) ? found[1].slice(prefix.length) : found[1];
      if (!this.samples.has(name)) this.samples.set(name, []);
      const labels = labelsOf(found[2] ?? "");
      if (model !== null && labels.model_name && labels.model_name !== model) continue;
      this.samples.get(name).push({ labels, value: numberOf(found[3]) });
    }
  }

  /** Return the sum of the samples of a name that have these labels; null without any. */
  sum(name, labels = {}) {
    const found = (this.samples.get(name) ?? []).filter((sample) => Object.entries(labels).every(([key, value]) => sample.labels[key] === value));
    return found.length ? found.reduce((total, sample) => total + sample.value, 0) : null;
  }

  /** Return sums by the values of one label. */
  by(name, label) {
    const sums = new Map();
    for (const sample of this.samples.get(name) ?? []) {
      const value = sample.labels[label] ?? "";
      sums.set(value, (sums.get(value) ?? 0) + sample.value);
    }
    return sums;
  }
}

function labelsOf(text) {
  const labels = {};
  for (const [, name, value] of text.matchAll(/([a-zA-Z_]\w*)="((?:[^"\\]|\\.)*)"/g)) {
    labels[name] = value.replace(/\\(.)/g, (_, sign) => (sign === "n" ? "\n" : sign));
  }
  return labels;
}

function numberOf(text) {
  if (text === "+Inf") return Infinity;
  if (text === "-Inf") return -Infinity;
  return Number(text);
}

/** Return how fast a counter grew between two scrapes, per second; a restart counts from 0. */
export function rate(before, now, name, labels = {}) {
  const grown = growth(before, now, name, labels);
  return grown === null ? null : grown / Math.max(0.001, (now.time - before.time) / 1000);
}

/** Return what a counter grew by between two scrapes. */
export function growth(before, now, name, labels = {}) {
  const value = now.sum(name, labels);
  if (!before || value === null) return null;
  const old = before.sum(name, labels) ?? 0;
  return value < old ? value : value - old;
}

/** Return a quantile of what a histogram saw between two scrapes; null when it saw nothing. */
export function quantile(before, now, name, fraction) {
  const counts = now.by(`${name}_bucket`, "le");
  const old = before?.by(`${name}_bucket`, "le") ?? new Map();
  const bounds = [...counts.keys()].map((bound) => [numberOf(bound), bound]).sort((a, b) => a[0] - b[0]);
  const grown = bounds.map(([limit, bound]) => [limit, counts.get(bound) - (old.get(bound) ?? 0)]);
  const total = grown.at(-1)?.[1] ?? 0;
  if (!(total > 0)) return null;
  let [low, below] = [0, 0];
  for (const [limit, upto] of grown) {
    if (upto >= fraction * total) {
      if (limit === Infinity) return low;
      return low + (limit - low) * ((fraction * total - below) / Math.max(1e-9, upto - below));
    }
    [low, below] = [limit, upto];
  }
  return low;
}
