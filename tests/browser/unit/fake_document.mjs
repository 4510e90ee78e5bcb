// A document that records what is built. It has no way to turn text into markup: a renderer that tried
// would fail here.

class FakeNode {
  constructor() {
    this.childNodes = [];
    this.parent = null;
  }

  append(...children) {
    for (const child of children) {
      const node = typeof child === "string" ? new FakeText(child) : child;
      node.parent = this;
      this.childNodes.push(node);
    }
  }

  get lastChild() {
    return this.childNodes.at(-1) ?? null;
  }

  remove() {
    this.parent.childNodes.splice(this.parent.childNodes.indexOf(this), 1);
  }

  replaceWith(node) {
    node.parent = this.parent;
    this.parent.childNodes[this.parent.childNodes.indexOf(this)] = node;
  }
}

class FakeText extends FakeNode {
  constructor(text) {
    super();
    this.text = text;
  }

  get textContent() {
    return this.text;
  }
}

class FakeElement extends FakeNode {
  constructor(tag) {
    super();
    this.tag = tag;
    this.attributes = {};
    this.listeners = {};
  }

  setAttribute(name, value) {
    this.attributes[name] = value;
  }

  addEventListener(name, listener) {
    this.listeners[name] = listener;
  }

  get textContent() {
    return this.childNodes.map((child) => child.textContent).join("");
  }

  set innerHTML(value) {
    throw new Error("text was turned into markup");
  }

  set outerHTML(value) {
    throw new Error("text was turned into markup");
  }
}

export const document = {
  createElement: (tag) => new FakeElement(tag),
  createTextNode: (text) => new FakeText(text),
};

/** Return nodes as text: `<p>text <em>more</em></p>`, attributes in the order of their names. */
export function show(nodes) {
  return nodes.map((node) => {
    if (node instanceof FakeText) return node.text;
    const attributes = Object.keys(node.attributes).sort().map((name) => ` ${name}="${node.attributes[name]}"`).join("");
    return `<${node.tag}${attributes}>${show(node.childNodes)}</${node.tag}>`;
  }).join("");
}

/** Return all elements below nodes. */
export function elements(nodes) {
  const found = [];
  const stack = [...nodes];
  while (stack.length) {
    const node = stack.pop();
    if (node instanceof FakeElement) found.push(node);
    for (const child of node.childNodes) stack.push(child);
  }
  return found;
}
