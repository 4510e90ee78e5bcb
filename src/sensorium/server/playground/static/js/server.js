// The state of the server: what it does now, out of /metrics.

import { getJson, getText } from "./lib/api.js";
import { Chart, Gauge } from "./lib/charts.js";
import { h, textButton } from "./lib/dom.js";
import { bytes, count, number, percent, seconds } from "./lib/format.js";
import { Scrape, growth, quantile, rate } from "./lib/prometheus.js";

const INTERVAL = 2000;
const WINDOW = 15; // scrapes that quantiles and hit rates look back over
const STAGES = ["fetch", "decode", "preprocess", "encode"];
const PROCESSES = ["engine", "server", "media"];

export class ServerView {
  #timer = null;
  #scrapes = [];
  #paused = false;
  #facts = null;
  #state = "ready";

  constructor() {
    this.charts = {
      speed: new Chart({ title: "Throughput", hint: "tokens per second", series: [{ label: "generated" }, { label: "prompt" }], format: number }),
      requests: new Chart({ title: "Requests", hint: "sequences", series: [{ label: "running" }, { label: "waiting" }], format: count }),
      first: new Chart({ title: "Time to first token", hint: "last 30 s", series: [{ label: "median" }, { label: "95 %" }], format: seconds }),
      between: new Chart({ title: "Time between tokens", hint: "last 30 s", series: [{ label: "median" }, { label: "95 %" }], format: seconds }),
      cache: new Chart({ title: "KV cache", hint: "in use", series: [{ label: "used" }], format: percent, most: 1 }),
      media: new Chart({ title: "Media", hint: "items", series: [{ label: "loading" }, { label: "in workers" }], format: count }),
      memory: new Chart({ title: "Memory", hint: "of the processes", series: PROCESSES.map((label) => ({ label })), format: bytes }),
    };
    this.gauges = {
      kv: new Gauge("KV cache"),
      prefix: new Gauge("Prefix cache hits"),
      processor: new Gauge("Preprocessed media"),
      processorHits: new Gauge("Preprocessed media hits"),
      encoder: new Gauge("Encoder outputs"),
      encoderHits: new Gauge("Encoder output hits"),
    };
    this.stages = h("tbody");
    this.totals = h("dl", { class: "totals" });
    this.models = h("tbody");
    this.modelsCard = h("section", { class: "card", hidden: true }, h("h3", {}, "Models"),
      h("table", { class: "stages models" }, h("thead", {}, h("tr", {}, ["Model", "State"].map((name) => h("th", { scope: "col" }, name)))), this.models));
    this.status = h("p", { class: "server-status", role: "status" });
    this.pause = textButton("pause", "Pause", () => this.#toggle());
    this.element = h("section", { class: "page", "aria-label": "Server" },
      h("div", { class: "page-head" }, h("div", {}, h("h2", {}, "Server"), this.status), this.pause),
      h("div", { class: "cards" }, this.#cards()));
  }

  #cards() {
    const { speed, requests, first, between, cache, media, memory } = this.charts;
    const caches = h("section", { class: "card" }, h("h3", {}, "Caches"), Object.values(this.gauges).map(({ element }) => element));
    const stages = h("section", { class: "card" }, h("h3", {}, "Media stages", h("small", {}, "since the start")),
      h("table", { class: "stages" }, h("thead", {}, h("tr", {}, ["Stage", "Items", "Each", "Bytes"].map((name) => h("th", { scope: "col" }, name)))), this.stages));
    const totals = h("section", { class: "card" }, h("h3", {}, "Since the start"), this.totals);
    return [this.modelsCard, ...[speed, requests, first, between, cache, media, memory].map(({ element }) => element), caches, stages, totals];
  }

  setFacts(facts) {
    if (facts.root !== this.#facts?.root) this.#scrapes = [];
    this.#facts = facts;
    this.#showModels(facts.models);
  }

  start() {
    this.#tick();
  }

  stop() {
    clearTimeout(this.#timer);
    this.#timer = null;
  }

  #toggle() {
    this.#paused = !this.#paused;
    this.pause.lastChild.textContent = this.#paused ? "Go on" : "Pause";
    if (this.#paused) this.stop();
    else this.#tick();
  }

  async #tick() {
    clearTimeout(this.#timer);
    try {
      const several = this.#facts?.models.length > 1;
      const [text, version, models] = await Promise.all([getText("metrics"), this.version ?? getJson("version"), several ? getJson("v1/models") : null]);
      this.version = version;
      if (models) this.#showModels(models.data.filter(({ id, root, parent }) => id === root && parent === null).map(({ id, state, reason }) => ({ name: id, state, reason })));
      this.#show(new Scrape(text, this.#facts?.metrics_prefix ?? "sensorium:", performance.now(), this.#facts?.root));
    } catch (error) {
      this.status.textContent = error.message;
      this.status.classList.add("is-bad");
    }
    if (!this.#paused && this.element.isConnected) this.#timer = setTimeout(() => this.#tick(), INTERVAL);
  }

  #show(now) {
    const before = this.#scrapes.at(-1);
    this.#scrapes.push(now);
    if (this.#scrapes.length > WINDOW) this.#scrapes.shift();
    const [first] = this.#scrapes;
    const up = now.sum("engine_up") !== 0;
    this.status.classList.toggle("is-bad", !up && this.#state !== "stopped");
    this.status.textContent = up ? `${this.#facts?.model ?? "The model"} is served by version ${this.version.version ?? "?"}.` : this.#whyDown();
    const { speed, requests, first: ttft, between, cache, media, memory } = this.charts;
    if (before) speed.add([rate(before, now, "generation_tokens_total"), rate(before, now, "prompt_tokens_total")]);
    requests.add([now.sum("num_requests_running"), now.sum("num_requests_waiting")]);
    const base = this.#scrapes.length > 1 ? first : null;
    ttft.add([0.5, 0.95].map((q) => base && quantile(base, now, "time_to_first_token_seconds", q)));
    between.add([0.5, 0.95].map((q) => base && quantile(base, now, "inter_token_latency_seconds", q)));
    cache.add([now.sum("kv_cache_usage_perc")]);
    media.add([now.sum("media_loading"), now.sum("media_workers_busy")]);
    memory.add(PROCESSES.map((process) => now.sum("process_resident_memory_bytes", { process })));
    this.#showCaches(now);
    this.#showStages(now);
    this.#showTotals(now);
  }

  #showModels(models) {
    this.modelsCard.hidden = models.length < 2;
    this.#state = models.find(({ name }) => name === this.#facts?.root)?.state;
    this.models.replaceChildren(...models.map(({ name, state, reason }) => h("tr", {}, h("th", { scope: "row" }, name), h("td", {}, state, reason && h("small", {}, reason)))));
  }

  #whyDown() {
    const { model } = this.#facts ?? { model: "The model" };
    if (this.#state === "stopped") return `${model} is not loaded; the next request loads it.`;
    if (this.#state === "failed") return `${model} could not be loaded.`;
    return "The engine is being restarted.";
  }

  #showCaches(now) {
    const { kv, prefix, processor, processorHits, encoder, encoderHits } = this.gauges;
    const used = now.sum("kv_cache_usage_perc");
    kv.set(used, percent(used));
    hits(prefix, now, "prefix_cache", "tokens");
    hits(processorHits, now, "mm_cache", "items");
    hits(encoderHits, now, "mm_encoder_cache", "items");
    room(processor, now, "mm_cache");
    room(encoder, now, "mm_encoder_cache");
  }

  #showStages(now) {
    this.stages.replaceChildren(...STAGES.map((stage) => {
      const of = (name) => now.sum(`media_stage_${name}_total`, { stage }) ?? 0;
      const items = of("items");
      return h("tr", {}, h("th", { scope: "row" }, stage), h("td", {}, count(items)),
        h("td", {}, items ? seconds(of("seconds") / items) : "–"), h("td", {}, bytes(of("bytes"))));
    }));
  }

  #showTotals(now) {
    const entries = [
      ["Requests", count(now.sum("request_success_total") ?? 0)],
      ["Failed", count(now.sum("request_success_total", { finished_reason: "error" }) ?? 0)],
      ["Generated tokens", count(now.sum("generation_tokens_total") ?? 0)],
      ["Prompt tokens", count(now.sum("prompt_tokens_total") ?? 0)],
      ["Preemptions", count(now.sum("num_preemptions_total") ?? 0)],
      ["Refused media", count(now.sum("media_failures_total") ?? 0)],
      ["Engine restarts", count(now.sum("engine_restarts_total") ?? 0)],
      ["Context", this.#facts?.max_model_len ? `${count(this.#facts.max_model_len)} tokens` : "–"],
    ];
    this.totals.replaceChildren(...entries.flatMap(([name, value]) => [h("dt", {}, name), h("dd", {}, value)]));
  }
}

function hits(gauge, now, name, unit) {
  const queries = growth(EMPTY, now, `${name}_queries_total`) ?? 0;
  const found = growth(EMPTY, now, `${name}_hits_total`) ?? 0;
  gauge.set(found / queries, queries ? `${percent(found / queries)} of ${count(queries)} ${unit}` : "no queries yet");
}

function room(gauge, now, name) {
  const used = now.sum(`${name}_bytes`);
  const capacity = now.sum(`${name}_capacity_bytes`);
  gauge.set(used / capacity, used === null ? "none" : `${bytes(used)} of ${bytes(capacity)}`);
}

const EMPTY = new Scrape("", "", 0);
