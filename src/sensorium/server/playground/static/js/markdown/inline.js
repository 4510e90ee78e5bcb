// Text of a block to a tree of inline nodes: text, code, math, break, strong, em, del, link, image.
//
// Emphasis follows the delimiter stack of CommonMark (https://spec.commonmark.org/0.31.2/#phase-2-inline-structure),
// which takes linear time; wrapped nodes know their depth, so that no text can nest them without bound.

const DEPTH = 16;
const LONGEST_ADDRESS = 2048;
const LONGEST_MATH = 2000;
const PUNCTUATION = /[!-/:-@[-`{-~]|\p{P}|\p{S}/u;
const SPACE = /\s/;
const SPECIAL = /[\\`*_~[\]!<$\n]|https?:\/\//g;
const BARE = /https?:\/\/[^\s<>"'`|\\^{}]{1,2000}/y;
const ANGLE = /<((?:https?:\/\/|mailto:)[^\s<>]{1,2000}|[\w.+-]{1,64}@[\w-]{1,63}(?:\.[\w-]{1,63}){1,8})>/y;
const TARGET = /\(\s{0,32}(?:<([^<>\n]{0,2048})>|([^\s()<]{0,2048}(?:\([^\s()]{0,1024}\)[^\s()]{0,1024}){0,8}))(?:\s{1,32}(?:"([^"]{0,512})"|'([^']{0,512})'))?\s{0,32}\)/y;

/** Return the address if it may be a link on the page, else null: http, https and mailto alone. */
export function safeAddress(text) {
  const trimmed = text.trim();
  if (trimmed.length > LONGEST_ADDRESS || !/^(?:https?:\/\/|mailto:)/i.test(trimmed)) return null;
  let url;
  try {
    url = new URL(trimmed);
  } catch {
    return null;
  }
  const known = url.protocol === "http:" || url.protocol === "https:" || url.protocol === "mailto:";
  return known && !url.username && !url.password ? url.href : null;
}

/** Return the nodes of a text, as a list. */
export function parseInline(text) {
  return new Inline(text).parse();
}

class Inline {
  constructor(text) {
    this.text = text;
    this.at = 0;
    this.head = { type: "root", children: null };
    this.tail = this.head;
    this.delimiters = []; // runs of * _ ~ that may open or close
    this.brackets = []; // [ and ![ that wait for a ]
    this.unclosed = new Set(); // lengths of runs of backticks that no later run closes
    this.inactive = 0; // brackets before this index can be no link: one is in them
  }

  parse() {
    const { text } = this;
    while (this.at < text.length) {
      SPECIAL.lastIndex = this.at;
      const next = SPECIAL.exec(text);
      const stop = next ? next.index : text.length;
      if (stop > this.at) this.push(text.slice(this.at, stop));
      this.at = stop;
      if (next) this.special(next[0]);
    }
    this.emphasize(0);
    return listOf(this.head.next);
  }

  special(sign) {
    if (sign === "\\") this.escape();
    else if (sign === "`") this.code();
    else if (sign === "$") this.dollar();
    else if (sign === "\n") this.lineBreak();
    else if (sign === "<") this.angle();
    else if (sign === "[") this.bracket(false, 1);
    else if (sign === "!") this.text[this.at + 1] === "[" ? this.bracket(true, 2) : this.literal(1);
    else if (sign === "]") this.close();
    else if (sign.length > 1) this.bare();
    else this.delimiter(sign);
  }

  add(node) {
    node.previous = this.tail;
    node.next = null;
    this.tail.next = node;
    this.tail = node;
    return node;
  }

  push(text) {
    return this.add({ type: "text", text, depth: 0 });
  }

  literal(length) {
    this.push(this.text.slice(this.at, this.at + length));
    this.at += length;
  }

  escape() {
    const next = this.text[this.at + 1];
    if (next === "(" || next === "[") {
      const end = this.find(next === "(" ? "\\)" : "\\]", this.at + 2);
      if (end > 0) return this.math(this.at + 2, end, end + 2);
    }
    if (next === "\n") {
      this.add({ type: "break", depth: 0 });
      this.at += 2;
    } else if (next !== undefined && /[!-/:-@[-`{-~]/.test(next)) {
      this.push(next);
      this.at += 2;
    } else this.literal(1);
  }

  code() {
    const { text } = this;
    let length = 1;
    while (text[this.at + length] === "`") length += 1;
    if (!this.unclosed.has(length)) {
      const runs = /`+/g;
      runs.lastIndex = this.at + length;
      for (let run = runs.exec(text); run; run = runs.exec(text)) {
        if (run[0].length !== length) continue;
        let inside = text.slice(this.at + length, run.index).replace(/\n/g, " ");
        if (/^ .* $/s.test(inside) && inside.trim()) inside = inside.slice(1, -1);
        this.add({ type: "code", text: inside, depth: 0 });
        this.at = run.index + length;
        return;
      }
      this.unclosed.add(length);
    }
    this.literal(length);
  }

  /** `$x$` and `$$x$$`; a sum of money such as $5 is text. */
  dollar() {
    const { text, at } = this;
    const sign = text.startsWith("$$", at) ? "$$" : "$";
    const start = at + sign.length;
    if (SPACE.test(text[start] ?? " ")) return this.literal(sign.length);
    const end = this.find(sign, start + 1);
    const fits = end > 0 && !SPACE.test(text[end - 1]) && !/\d/.test(text[end + sign.length] ?? "");
    const money = sign === "$" && /^\d[\d.,]*(?:\s|$)/.test(text.slice(start, Math.min(end, start + 32)));
    if (!fits || money) return this.literal(sign.length);
    return this.math(start, end, end + sign.length);
  }

  /** Return where `sign` comes next within what mathematics may be long, else -1. */
  find(sign, start) {
    const at = this.text.slice(start, start + LONGEST_MATH).indexOf(sign);
    return at < 0 ? -1 : start + at;
  }

  math(start, end, after) {
    this.add({ type: "math", text: this.text.slice(start, end), depth: 0 });
    this.at = after;
  }

  lineBreak() {
    const last = this.tail;
    if (last.type === "text") last.text = last.text.trimEnd();
    this.add({ type: "break", depth: 0 });
    this.at += 1;
  }

  angle() {
    ANGLE.lastIndex = this.at;
    const found = ANGLE.exec(this.text);
    const address = found && safeAddress(/^(?:https?:|mailto:)/i.test(found[1]) ? found[1] : `mailto:${found[1]}`);
    if (!address) return this.literal(1);
    this.link(address, found[1]);
    this.at += found[0].length;
  }

  bare() {
    BARE.lastIndex = this.at;
    let found = BARE.exec(this.text)?.[0] ?? "";
    found = found.replace(/[.,:;!?*_~\]]+$/, "");
    let surplus = found.split(")").length - found.split("(").length;
    for (; surplus > 0 && found.endsWith(")"); surplus -= 1) found = found.slice(0, -1);
    const before = this.text[this.at - 1] ?? " ";
    const address = /[\p{L}\p{N}]/u.test(before) ? null : safeAddress(found);
    if (!address) return this.literal(4);
    this.link(address, found);
    this.at += found.length;
  }

  link(address, text) {
    this.add({ type: "link", address, children: [{ type: "text", text }], depth: 1 });
  }

  delimiter(sign) {
    const { text, at } = this;
    let length = 1;
    while (text[at + length] === sign) length += 1;
    const [before, after] = [text[at - 1] ?? " ", text[at + length] ?? " "];
    const [spaceBefore, spaceAfter] = [SPACE.test(before), SPACE.test(after)];
    const [signBefore, signAfter] = [PUNCTUATION.test(before), PUNCTUATION.test(after)];
    const left = !spaceAfter && (!signAfter || spaceBefore || signBefore);
    const right = !spaceBefore && (!signBefore || spaceAfter || signAfter);
    const node = this.push(text.slice(at, at + length));
    this.at += length;
    if (sign === "~" && length !== 2) return;
    const opens = sign === "_" ? left && (!right || signBefore) : left;
    const closes = sign === "_" ? right && (!left || signAfter) : right;
    if (opens || closes) this.delimiters.push({ sign, length, full: length, opens, closes, node });
  }

  bracket(isImage, length) {
    const node = this.push(isImage ? "![" : "[");
    this.at += length;
    this.brackets.push({ node, isImage, start: this.at, bottom: this.delimiters.length });
  }

  close() {
    const open = this.brackets.pop();
    const dead = this.brackets.length < this.inactive;
    this.inactive = Math.min(this.inactive, this.brackets.length);
    if (!open || (dead && !open.isImage)) return this.literal(1);
    TARGET.lastIndex = this.at + 1;
    const found = TARGET.exec(this.text);
    if (!found) return this.literal(1);
    const address = safeAddress(found[1] ?? found[2] ?? "");
    const label = this.text.slice(open.start, this.at);
    this.at += 1 + found[0].length;
    this.emphasize(open.bottom);
    const children = this.cut(open.node).flatMap((node) => (node.type === "link" ? node.children : [node]));
    const depth = depthOf(children) + 1;
    if (open.isImage) this.add({ type: "image", address, alt: label.slice(0, 500), depth: 0 });
    else if (depth > DEPTH || !address) children.forEach((node) => this.add(node));
    else {
      this.add({ type: "link", address, children, depth });
      this.inactive = this.brackets.length; // no link in a link
    }
  }

  /** Remove a node and all behind it; return those behind it. */
  cut(node) {
    const behind = listOf(node.next);
    this.tail = node.previous;
    this.tail.next = null;
    return behind;
  }

  /** Pair the delimiters from index `bottom` on, and forget them. */
  emphasize(bottom) {
    const stack = this.delimiters.splice(bottom);
    const open = []; // those that may still open, in order
    const floors = new Map(); // of a kind of closer: openers below this index do not fit
    for (const closer of stack) {
      while (closer.closes && closer.length) {
        const kind = `${closer.sign}${closer.opens}${closer.full % 3}`;
        let at = open.length - 1;
        const floor = floors.get(kind) ?? 0;
        while (at >= floor && !fits(open[at], closer)) at -= 1;
        if (at < floor) {
          floors.set(kind, open.length);
          break;
        }
        const opener = open[at];
        open.length = opener.length ? at + 1 : at;
        for (const [key, value] of floors) if (value > open.length) floors.set(key, open.length);
        this.wrap(opener, closer);
        if (!opener.length) open.length = at;
      }
      if (closer.opens && closer.length) open.push(closer);
    }
  }

  wrap(opener, closer) {
    const strong = closer.sign === "~" || (opener.length > 1 && closer.length > 1);
    const used = strong ? 2 : 1;
    for (const end of [opener, closer]) {
      end.length -= used;
      end.node.text = end.node.text.slice(used);
    }
    const first = opener.node.next;
    const children = first === closer.node ? [] : range(first, closer.node);
    const depth = depthOf(children) + 1;
    if (depth > DEPTH || !children.length) {
      opener.node.text += closer.sign.repeat(used);
      closer.node.text += closer.sign.repeat(used);
      if (!children.length) closer.length = 0;
      return;
    }
    const type = closer.sign === "~" ? "del" : strong ? "strong" : "em";
    const node = { type, children, depth, previous: opener.node, next: closer.node };
    opener.node.next = node;
    closer.node.previous = node;
  }
}

/** Rule of three: runs whose lengths add up to a multiple of 3 pair only if both are such. */
function fits(opener, closer) {
  if (opener.sign !== closer.sign || !opener.length) return false;
  const both = opener.closes || closer.opens;
  return !both || (opener.full + closer.full) % 3 !== 0 || (opener.full % 3 === 0 && closer.full % 3 === 0);
}

function range(first, end) {
  const nodes = [];
  for (let node = first; node && node !== end; node = node.next) nodes.push(node);
  return nodes;
}

function listOf(first) {
  return range(first, null).filter((node) => node.type !== "text" || node.text);
}

function depthOf(nodes) {
  return nodes.reduce((most, node) => Math.max(most, node.depth ?? 0), 0);
}
