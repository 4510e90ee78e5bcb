// Small live charts, drawn as SVG.

import { h, svg } from "./dom.js";

const WIDTH = 320;
const HEIGHT = 88;
const POINTS = 60;

/**
 * A chart of up to three series over time, with their last values as text.
 *
 * `series`: [{name, label}] in the order of their colours. `format` makes texts of values.
 */
export class Chart {
  #values;

  constructor({ title, hint = "", series, format, most = null }) {
    Object.assign(this, { title, series, format, most });
    this.#values = series.map(() => []);
    this.figures = series.map(({ label }, i) => {
      const value = h("b", {}, "–");
      return { value, view: h("div", { class: "chart-figure" }, h("i", { class: ["swatch", `series-${i}`] }), value, h("span", {}, label)) };
    });
    this.lines = series.map((_, i) => [
      svg("path", { class: `chart-area series-${i}` }),
      svg("path", { class: `chart-line series-${i}` }),
    ]);
    this.top = h("span", { class: "chart-top hint" });
    this.drawing = svg("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, preserveAspectRatio: "none", class: "chart-drawing", role: "img" },
      svg("line", { class: "chart-base", x1: 0, x2: WIDTH, y1: HEIGHT - 0.5, y2: HEIGHT - 0.5 }), this.lines);
    this.element = h("section", { class: "card chart" }, h("h3", {}, title, hint && h("small", {}, hint)),
      h("div", { class: "chart-figures" }, this.figures.map(({ view }) => view)),
      h("div", { class: "chart-place" }, this.top, this.drawing));
    this.#draw();
  }

  /** Add a value of each series; null where there is none. */
  add(values) {
    this.#values.forEach((list, i) => {
      list.push(values[i] ?? null);
      if (list.length > POINTS) list.shift();
    });
    this.#draw();
  }

  #draw() {
    const known = this.#values.flat().filter((value) => value !== null);
    const most = this.most ?? nice(Math.max(...known, 0));
    this.top.textContent = known.length ? this.format(most) : "";
    const told = this.series.map(({ label }, i) => {
      const last = this.#values[i].at(-1);
      const text = last === null || last === undefined ? "–" : this.format(last);
      this.figures[i].value.textContent = text;
      return `${label} ${text}`;
    });
    this.drawing.setAttribute("aria-label", `${this.title}: ${told.join(", ")}`);
    this.#values.forEach((list, i) => {
      const [area, line] = pathsOf(list, most || 1);
      this.lines[i][0].setAttribute("d", i ? "" : area);
      this.lines[i][1].setAttribute("d", line);
    });
  }
}

function pathsOf(values, most) {
  const step = WIDTH / (POINTS - 1);
  const left = WIDTH - (values.length - 1) * step;
  let line = "";
  let area = "";
  let open = false;
  let x = 0;
  values.forEach((value, i) => {
    if (value === null) {
      if (open) area += `L${x.toFixed(1)},${HEIGHT}Z`;
      open = false;
      return;
    }
    x = left + i * step;
    const y = HEIGHT - 1 - Math.min(1, value / most) * (HEIGHT - 4);
    const at = `${x.toFixed(1)},${y.toFixed(1)}`;
    line += `${open ? "L" : "M"}${at}`;
    area += open ? `L${at}` : `M${x.toFixed(1)},${HEIGHT}L${at}`;
    open = true;
  });
  if (open) area += `L${x.toFixed(1)},${HEIGHT}Z`;
  return [area, line];
}

/** Return the next of 1, 2, 5, 10 … that is not below a value. */
function nice(value) {
  if (!(value > 0)) return 1;
  const power = 10 ** Math.floor(Math.log10(value));
  return [1, 2, 5, 10].map((factor) => factor * power).find((limit) => limit >= value);
}

/** A bar from 0 to a capacity, with both as text. */
export class Gauge {
  constructor(label) {
    this.value = h("span", { class: "gauge-value" }, "–");
    this.fill = h("i");
    this.bar = h("div", { class: "gauge-bar", role: "meter", "aria-label": label, "aria-valuemin": 0, "aria-valuemax": 100 }, this.fill);
    this.element = h("div", { class: "gauge" }, h("div", { class: "gauge-text" }, h("span", {}, label), this.value), this.bar);
  }

  set(fraction, text) {
    const share = Math.min(1, Math.max(0, Number.isFinite(fraction) ? fraction : 0));
    this.fill.style.setProperty("--share", share.toFixed(4));
    this.bar.setAttribute("aria-valuenow", Math.round(100 * share));
    this.bar.setAttribute("aria-valuetext", text);
    this.value.textContent = text;
  }
}
