// For embedding models: texts and images side by side, and how similar their embeddings are.

import { postJson } from "./lib/api.js";
import { h, iconButton, textButton, toast } from "./lib/dom.js";
import { count, seconds } from "./lib/format.js";
import { dataUrl } from "./lib/store.js";
import { kindOf } from "./chat/media.js";

const MOST = 8;
const FIRST = ["A red circle", "A blue square"];

export class EmbedView {
  #inputs = [];
  #facts = { modalities: ["text"], model: "" };

  constructor({ unauthorized }) {
    this.unauthorized = unauthorized;
    this.list = h("ol", { class: "embed-inputs" });
    this.add = textButton("plus", "Add an input", () => this.#add());
    this.go = textButton("vector", "Compare", () => this.#compare(), { class: "button button-primary" });
    this.result = h("div", { class: "embed-result", role: "status" });
    const intro = h("p");
    this.intro = intro;
    this.element = h("section", { class: "page", "aria-label": "Embeddings" },
      h("div", { class: "page-head" }, h("div", {}, h("h2", {}, "Embeddings"), intro)),
      this.list, h("div", { class: "dialog-actions embed-actions" }, this.add, this.go), this.result);
    for (const text of FIRST) this.#add(text);
  }

  setFacts(facts) {
    this.#facts = facts;
    const images = facts.modalities.includes("image");
    this.intro.textContent = `${facts.model} makes vectors of texts${images ? " and images" : ""}. Vectors that point the same way mean similar things.`;
    for (const input of this.#inputs) input.pick.hidden = !images;
  }

  start() {}

  stop() {}

  #add(text = "") {
    if (this.#inputs.length >= MOST) return toast(`At most ${MOST} inputs are compared.`);
    const input = { blob: null, name: "" };
    input.field = h("textarea", { rows: 2, value: text, "aria-label": `Input ${this.#inputs.length + 1}`, placeholder: "A text" });
    input.picture = h("img", { alt: "", hidden: true, class: "embed-picture" });
    input.file = h("input", { type: "file", accept: "image/*", hidden: true, "aria-label": "Image", onchange: () => this.#setImage(input, input.file.files[0]) });
    input.pick = iconButton("image", "Choose an image", () => input.file.click(), { hidden: !this.#facts.modalities.includes("image") });
    const remove = iconButton("close", "Remove the input", () => {
      this.#inputs = this.#inputs.filter((other) => other !== input);
      input.view.remove();
    });
    input.view = h("li", {
      class: "card embed-input",
      ondragover: (event) => event.preventDefault(),
      ondrop: (event) => {
        event.preventDefault();
        this.#setImage(input, event.dataTransfer.files[0]);
      },
      onpaste: (event) => event.clipboardData.files[0] && (event.preventDefault(), this.#setImage(input, event.clipboardData.files[0])),
    }, input.picture, input.field, h("div", { class: "embed-tools" }, input.file, input.pick, remove));
    this.#inputs.push(input);
    this.list.append(input.view);
    return input;
  }

  #setImage(input, file) {
    if (!file) return;
    if (kindOf(file) !== "image" || !this.#facts.modalities.includes("image")) {
      toast(`${file.name}: this model takes no such files.`, { error: true });
      return;
    }
    if (input.url) URL.revokeObjectURL(input.url);
    Object.assign(input, { blob: file, name: file.name, url: URL.createObjectURL(file) });
    Object.assign(input.picture, { src: input.url, alt: file.name, hidden: false });
  }

  async #compare() {
    const inputs = this.#inputs.filter((input) => input.blob || input.field.value.trim());
    if (inputs.length < 2) return toast("Give at least two inputs.", { error: true });
    this.go.disabled = true;
    const began = performance.now();
    try {
      const answers = await Promise.all(inputs.map((input) => this.#embed(input)));
      const vectors = answers.map(({ data }) => data[0].embedding);
      this.#show(inputs, vectors, answers.reduce((sum, { usage }) => sum + usage.prompt_tokens, 0), (performance.now() - began) / 1000);
    } catch (error) {
      this.result.replaceChildren(h("div", { class: "error", role: "alert" }, h("p", {}, error.message)));
      if (error.status === 401) this.unauthorized();
    }
    this.go.disabled = false;
  }

  async #embed(input) {
    const text = input.field.value.trim();
    const { model } = this.#facts;
    if (!input.blob) return postJson("v1/embeddings", { model, input: text });
    const content = [{ type: "image_url", image_url: { url: await dataUrl(input.blob) } }];
    if (text) content.push({ type: "text", text });
    return postJson("v1/embeddings", { model, messages: [{ role: "user", content }] });
  }

  #show(inputs, vectors, tokens, took) {
    const names = inputs.map((input, i) => (input.field.value.trim() || input.name || `Input ${i + 1}`).slice(0, 60));
    const head = h("tr", {}, h("td", {}), names.map((name) => h("th", { scope: "col" }, name)));
    const rows = vectors.map((a, i) => h("tr", {}, h("th", { scope: "row" }, names[i]), vectors.map((b) => cell(cosine(a, b)))));
    this.result.replaceChildren(h("div", { class: "card table-scroll", tabindex: "0", role: "region", "aria-label": "Similarities" },
      h("table", { class: "similarities" }, h("caption", {}, "Cosine similarity"), h("thead", {}, head), h("tbody", {}, rows))),
    h("p", { class: "hint" }, `${count(vectors[0].length)} dimensions, ${count(tokens)} tokens, ${seconds(took)}.`));
  }
}

function cell(value) {
  const node = h("td", { class: "similarity" }, value.toFixed(3));
  node.style.setProperty("--share", Math.max(0, value).toFixed(3));
  return node;
}

function cosine(a, b) {
  let [dot, left, right] = [0, 0, 0];
  for (let i = 0; i < a.length; i += 1) {
    dot += a[i] * b[i];
    left += a[i] * a[i];
    right += b[i] * b[i];
  }
  return dot / Math.sqrt(left * right || 1);
}
