// What an answer took: figures in a line, a bar of where the time went, and the details.

import { h } from "../lib/dom.js";
import { count, counted, number, seconds } from "../lib/format.js";

const PARTS = [
  ["fetch", "Fetch", "reading the files"],
  ["decode", "Decode", "files to pixels and samples"],
  ["preprocess", "Preprocess", "the model's processor"],
  ["render", "Render", "template, tokens and the rest of preparing"],
  ["queue", "Queue", "waiting for a step"],
  ["encode", "Encode", "media to embeddings"],
  ["prefill", "Prefill", "computing the prompt"],
  ["generate", "Generate", "first token to last"],
];

/** Return the seconds of each part of the time, from the `metrics` of an answer. */
export function partsOf(metrics) {
  const items = metrics.items ?? [];
  const sum = (name) => items.reduce((total, item) => total + (item[name] ?? 0), 0);
  const media = { fetch: sum("fetch_seconds"), decode: sum("decode_seconds"), preprocess: sum("preprocess_seconds") };
  const prepare = metrics.prepare_seconds ?? 0;
  const loaded = media.fetch + media.decode + media.preprocess;
  // Items load at the same time: together they take no longer than preparing took.
  const scale = loaded > prepare && loaded > 0 ? prepare / loaded : 1;
  for (const name of Object.keys(media)) media[name] *= scale;
  return {
    ...media,
    render: Math.max(0, prepare - loaded * scale),
    queue: metrics.queue_seconds ?? 0,
    encode: metrics.encode_seconds ?? 0,
    prefill: metrics.prefill_seconds ?? 0,
    generate: metrics.decode_seconds ?? 0,
  };
}

/** Return the figures and the bar of an answer; null when nothing is known. */
export function timingView(answer) {
  const { metrics, usage, client = {} } = answer;
  const figures = [];
  const add = (value, text) => figures.push(h("span", { class: "figure" }, h("b", {}, value), ` ${text}`));
  const generated = usage?.completion_tokens ?? 0;
  const speed = metrics?.tokens_per_second ?? (client.total > client.first && generated > 1 ? (generated - 1) / (client.total - client.first) : null);
  if (speed) add(number(speed), "tokens/s");
  const first = metrics?.time_to_first_token_seconds ?? client.first;
  if (first) add(seconds(first), "to first token");
  if (usage) {
    add(count(generated), generated === 1 ? "token" : "tokens");
    const cached = usage.prompt_tokens_details?.cached_tokens ?? 0;
    add(count(cached), `of ${count(usage.prompt_tokens)} prompt tokens cached`);
  }
  if (!figures.length) return null;
  const line = h("div", { class: "figures" }, figures);
  return metrics ? h("details", { class: "timing" }, h("summary", {}, line, bar(partsOf(metrics))), details(metrics, usage)) : h("div", { class: "timing" }, line);
}

function bar(parts) {
  const total = Object.values(parts).reduce((sum, value) => sum + value, 0);
  const told = PARTS.filter(([name]) => parts[name] > 0).map(([name, label]) => `${label.toLowerCase()} ${seconds(parts[name])}`);
  const pieces = PARTS.filter(([name]) => parts[name] > 0.002 * total).map(([name]) => {
    const piece = h("i", { class: `part-${name}` });
    piece.style.setProperty("--share", (parts[name] / total).toFixed(4));
    return piece;
  });
  return h("div", { class: "bar", role: "img", "aria-label": `Where the time went: ${told.join(", ")}` }, pieces);
}

function details(metrics, usage) {
  const parts = partsOf(metrics);
  const total = metrics.total_seconds ?? Object.values(parts).reduce((sum, value) => sum + value, 0);
  const rows = PARTS.map(([name, label, hint]) => h("tr", { class: parts[name] > 0 ? null : "is-zero" },
    h("th", { scope: "row" }, h("i", { class: ["swatch", `part-${name}`] }), label),
    h("td", { class: "hint" }, hint), h("td", { class: "amount" }, seconds(parts[name]))));
  rows.push(h("tr", { class: "total" }, h("th", { scope: "row" }, "Total"), h("td", {}), h("td", { class: "amount" }, seconds(total))));
  return h("div", { class: "timing-details" },
    h("table", { class: "times" }, h("caption", { class: "visually-hidden" }, "Where the time went"), h("tbody", {}, rows)),
    itemsView(metrics.items ?? []), tokensView(usage));
}

function itemsView(items) {
  if (!items.length) return null;
  return h("ul", { class: "items" }, items.map((item) => h("li", {},
    `${item.modality}: ${counted(item.num_tokens, "token")}`,
    item.num_frames ? `, ${counted(item.num_frames, "frame")}` : "",
    item.cached ? ", preprocessed before" : `, decoded in ${seconds(item.decode_seconds)}, preprocessed in ${seconds(item.preprocess_seconds)}`)));
}

function tokensView(usage) {
  if (!usage) return null;
  const kinds = Object.entries(usage.prompt_tokens_details ?? {})
    .filter(([name, value]) => name.endsWith("_tokens") && name !== "cached_tokens" && value)
    .map(([name, value]) => `${count(value)} of ${name.replace("_tokens", "")}`);
  return h("p", { class: "hint" }, `Prompt: ${counted(usage.prompt_tokens, "token")}${kinds.length ? `, ${kinds.join(", ")}` : ""}. Answer: ${counted(usage.completion_tokens ?? 0, "token")}.`);
}
