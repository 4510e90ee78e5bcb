// Blocks of Markdown to DOM nodes. Text becomes text nodes, never markup; addresses pass safeAddress.

import { parseBlocks } from "./blocks.js";
import { parseInline } from "./inline.js";

/** Makes the nodes of one document. `onCopy(text)` is called by the button of a code block. */
export class Renderer {
  constructor(document, { onCopy = null } = {}) {
    this.document = document;
    this.onCopy = onCopy;
  }

  /** Return the nodes of a text. */
  render(text) {
    return outlined(parseBlocks(text)).map((block) => this.block(block));
  }

  make(tag, attributes = {}, children = []) {
    const element = this.document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) {
      if (value !== null && value !== undefined) element.setAttribute(name, String(value));
    }
    for (const child of children) element.append(child);
    return element;
  }

  block(block) {
    switch (block.type) {
      case "heading":
        return block.rank ? this.make(`h${block.rank}`, {}, this.inline(block.text)) : this.make("p", {}, [this.make("strong", {}, this.inline(block.text))]);
      case "code":
        return this.code(block);
      case "math":
        return this.make("pre", { class: "math", tabindex: "0" }, [block.text]);
      case "rule":
        return this.make("hr");
      case "quote":
        return this.make("blockquote", {}, block.blocks.map((inner) => this.block(inner)));
      case "list":
        return this.list(block);
      case "table":
        return this.table(block);
      default:
        return this.make("p", {}, this.inline(block.text));
    }
  }

  code(block) {
    const head = [this.make("span", {}, [block.language || "text"])];
    if (this.onCopy) {
      const button = this.make("button", { type: "button", class: "copy" }, ["Copy"]);
      button.addEventListener("click", () => this.onCopy(block.text));
      head.push(button);
    }
    const label = block.language ? `Code in ${block.language}` : "Code";
    return this.make("div", { class: "code-block" }, [
      this.make("div", { class: "code-head" }, head),
      this.make("pre", { tabindex: "0", role: "region", "aria-label": label }, [this.make("code", {}, [block.text])]),
    ]);
  }

  list(block) {
    const start = block.ordered && block.start !== 1 ? block.start : null;
    const items = block.items.map((item) => {
      const children = item.blocks.flatMap((inner) =>
        inner.type === "paragraph" && !block.loose ? this.inline(inner.text) : [this.block(inner)]);
      if (item.checked === null) return this.make("li", {}, children);
      const box = this.make("span", { role: "img", "aria-label": item.checked ? "done" : "open", class: "task" }, [item.checked ? "☑" : "☐"]);
      return this.make("li", { class: "task-item" }, [box, " ", ...children]);
    });
    return this.make(block.ordered ? "ol" : "ul", { start }, items);
  }

  table(block) {
    const row = (tag, cells) => this.make("tr", {}, cells.map((text, column) => {
      const align = block.aligns[column];
      const attributes = { class: align ? `align-${align}` : null, scope: tag === "th" ? "col" : null };
      return this.make(tag, attributes, this.inline(text));
    }));
    const table = this.make("table", {}, [
      this.make("thead", {}, [row("th", block.head)]),
      this.make("tbody", {}, block.rows.map((cells) => row("td", cells))),
    ]);
    return this.make("div", { class: "table-scroll", tabindex: "0", role: "region", "aria-label": "Table" }, [table]);
  }

  inline(text) {
    return parseInline(text).map((node) => this.node(node));
  }

  node(node) {
    switch (node.type) {
      case "text":
        return this.document.createTextNode(node.text);
      case "code":
        return this.make("code", {}, [node.text]);
      case "math":
        return this.make("code", { class: "math" }, [node.text]);
      case "break":
        return this.make("br");
      case "link":
        return this.anchor(node.address, node.children.map((child) => this.node(child)));
      case "image": // never loaded: an address in an answer could tell someone that it was read
        return node.address
          ? this.anchor(node.address, [`Image: ${node.alt || node.address}`])
          : this.make("span", { class: "missing-image" }, [`Image: ${node.alt}`]);
      default:
        return this.make(node.type, {}, node.children.map((child) => this.node(child)));
    }
  }

  anchor(address, children) {
    return this.make("a", { href: address, target: "_blank", rel: "noopener noreferrer nofollow", title: address }, children);
  }
}

/**
 * Give headings a rank on the page, whose own have 1 and 2; none is skipped, whatever a model writes. Those
 * in quotes and lists get none.
 */
function outlined(blocks) {
  let last = 2;
  for (const block of blocks) {
    if (block.type === "heading") last = block.rank = Math.min(6, block.level + 2, last + 1);
  }
  return blocks;
}

/** A text that grows: only blocks whose source has changed are made again. */
export class GrowingText {
  #sources = [];

  constructor(element, renderer) {
    this.element = element;
    this.renderer = renderer;
  }

  /** Show `text`. */
  update(text) {
    const blocks = outlined(parseBlocks(text));
    blocks.forEach((block, index) => {
      const source = `${block.rank ?? ""} ${block.source}`;
      if (this.#sources[index] === source) return;
      const node = this.renderer.block(block);
      const old = this.element.childNodes[index];
      if (old) old.replaceWith(node);
      else this.element.append(node);
      this.#sources[index] = source;
    });
    while (this.element.childNodes.length > blocks.length) this.element.lastChild.remove();
    this.#sources.length = blocks.length;
  }
}
