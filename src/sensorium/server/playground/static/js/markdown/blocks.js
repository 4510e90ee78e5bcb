// Markdown to blocks. Text of a model is input from a stranger: it is parsed into plain objects, with
// bounds on depth, in time that grows linearly, and HTML in it stays text.

const DEPTH = 12; // nested quotes and lists; what is deeper stays text
const MATH_LINES = 200;
const LONGEST_DELIMITERS = 1000;
const COLUMNS = 64;

const FENCE = /^( {0,3})(`{3,}|~{3,})(.*)$/;
const HEADING = /^ {0,3}(#{1,6})(?=\s|$)(.*)$/;
const RULE = /^ {0,3}([-*_])(?:\s*\1){2,}\s*$/;
const QUOTE = /^ {0,3}> ?/;
const ITEM = /^( *)([-*+]|\d{1,9}[.)])(?: {1,4}|\t|$)(.*)$/;
const TASK = /^\[([ xX])\] +/;
const DELIMITERS = /^ {0,3}\|?\s*:?-+:?\s*(?:\|\s*:?-+:?\s*)*\|?\s*$/;
const MATH = /^\s*(\$\$|\\\[)(.*)$/;
const UNDERLINE = /^ {0,3}(=+|-+)\s*$/;

/**
 * Return the blocks of `text`. Each has a `type`, its `source`, and what belongs to the type:
 * heading (level, text), paragraph (text), code (language, text), math (text), rule,
 * quote (blocks), list (ordered, start, loose, items of {checked, blocks}), table (aligns, head, rows).
 */
export function parseBlocks(text) {
  return parse(text.replace(/\r\n?/g, "\n").replace(/\0/g, "\ufffd").split("\n"), 0);
}

function parse(lines, depth) {
  const blocks = [];
  let at = 0;
  while (at < lines.length) {
    if (!lines[at].trim()) {
      at += 1;
      continue;
    }
    const [block, end] = blockAt(lines, at, depth);
    block.source = lines.slice(at, end).join("\n");
    blocks.push(block);
    at = end;
  }
  return blocks;
}

function blockAt(lines, at, depth) {
  const line = lines[at];
  const readers = depth < DEPTH ? [code, heading, rule, math, quote, list, table] : [code, heading, rule, math];
  for (const reader of readers) {
    const found = reader(lines, at, depth);
    if (found) return found;
  }
  return indent(line) >= 4 ? indentedCode(lines, at) : paragraph(lines, at, depth);
}

function code(lines, at) {
  const open = fence(lines[at]);
  if (!open) return null;
  const inside = [];
  let end = at + 1;
  for (; end < lines.length; end += 1) {
    const close = fence(lines[end]);
    if (close && close.sign === open.sign && close.length >= open.length && !close.info) break;
    inside.push(outdent(lines[end], open.margin));
  }
  const closed = end < lines.length;
  const [language] = open.info.split(/\s/, 1);
  return [{ type: "code", language: language.slice(0, 40), text: inside.join("\n"), closed }, closed ? end + 1 : end];
}

function fence(line) {
  const found = FENCE.exec(line);
  if (!found) return null;
  const [, margin, run, info] = found;
  if (run[0] === "`" && info.includes("`")) return null;
  return { margin: margin.length, sign: run[0], length: run.length, info: info.trim() };
}

function indentedCode(lines, at) {
  let end = at;
  while (end < lines.length && (indent(lines[end]) >= 4 || !lines[end].trim())) end += 1;
  while (!lines[end - 1].trim()) end -= 1;
  const text = lines.slice(at, end).map((line) => outdent(line, 4)).join("\n");
  return [{ type: "code", language: "", text, closed: true }, end];
}

function heading(lines, at) {
  const found = HEADING.exec(lines[at]);
  if (!found) return null;
  const text = found[2].trim().replace(/(?:^|\s)#+$/, "");
  return [{ type: "heading", level: found[1].length, text }, at + 1];
}

function rule(lines, at) {
  return RULE.test(lines[at]) ? [{ type: "rule" }, at + 1] : null;
}

function math(lines, at) {
  const open = MATH.exec(lines[at]);
  if (!open) return null;
  const close = open[1] === "$$" ? "$$" : "\\]";
  const inside = [];
  let rest = open[2];
  for (let end = at; end < Math.min(lines.length, at + MATH_LINES); end += 1) {
    if (end > at) rest = lines[end];
    const stop = rest.indexOf(close);
    if (stop >= 0) {
      if (rest.slice(stop + 2).trim()) return null; // text goes on: inline
      inside.push(rest.slice(0, stop));
      return [{ type: "math", text: inside.join("\n").trim() }, end + 1];
    }
    if (end > at && !rest.trim()) return null;
    inside.push(rest);
  }
  return null;
}

function quote(lines, at, depth) {
  if (!QUOTE.test(lines[at])) return null;
  const inside = [];
  let end = at;
  for (; end < lines.length && lines[end].trim(); end += 1) {
    if (!QUOTE.test(lines[end]) && beginsBlock(lines[end])) break;
    inside.push(lines[end].replace(QUOTE, ""));
  }
  return [{ type: "quote", blocks: parse(inside, depth + 1) }, end];
}

function list(lines, at, depth) {
  const first = marker(lines[at]);
  if (!first || first.indent > 3) return null;
  const items = [];
  let loose = false;
  let end = at;
  while (end < lines.length) {
    const found = marker(lines[end]);
    if (!found || found.kind !== first.kind || found.indent > first.indent + 1) break;
    const item = itemAt(lines, end, found, first.indent);
    items.push(itemOf(item.lines, depth));
    loose ||= item.loose;
    end = item.end;
    if (item.last) break;
  }
  const start = first.kind === "." || first.kind === ")" ? first.number : null;
  return [{ type: "list", ordered: start !== null, start, loose, items }, end];
}

/** Return the lines of one item, without their indent, and where it ends. */
function itemAt(lines, at, found, base) {
  const inside = [found.rest];
  let loose = false;
  let end = at + 1;
  while (end < lines.length) {
    const line = lines[end];
    if (!line.trim()) {
      let next = end;
      while (next < lines.length && !lines[next].trim()) next += 1;
      if (next === lines.length) return { lines: inside, loose, end, last: true };
      if (indent(lines[next]) >= base + 2) {
        inside.push("");
        loose = true;
        end = next;
        continue;
      }
      const follows = marker(lines[next])?.kind === found.kind;
      return { lines: inside, loose: loose || follows, end: follows ? next : end, last: !follows };
    }
    if (indent(line) >= base + 2) inside.push(outdent(line, found.width));
    else if (marker(line) || beginsBlock(line)) break;
    else inside.push(line.trim());
    end += 1;
  }
  return { lines: inside, loose, end, last: false };
}

function itemOf(lines, depth) {
  const task = TASK.exec(lines[0]);
  if (task) lines[0] = lines[0].slice(task[0].length);
  return { checked: task ? task[1] !== " " : null, blocks: parse(lines, depth + 1) };
}

function marker(line) {
  const found = ITEM.exec(line);
  if (!found || RULE.test(line)) return null;
  const [whole, margin, sign, rest] = found;
  const kind = sign.at(-1);
  return { indent: margin.length, kind, number: Number.parseInt(sign, 10), rest, width: whole.length - rest.length };
}

function table(lines, at) {
  if (!lines[at].includes("|") || at + 1 >= lines.length) return null;
  const under = lines[at + 1];
  if (!under.includes("-") || under.length > LONGEST_DELIMITERS || !DELIMITERS.test(under)) return null;
  const head = cells(lines[at]);
  const marks = cells(under);
  if (head.length !== marks.length || head.length > COLUMNS) return null;
  const aligns = marks.map((mark) => {
    const [left, right] = [mark.startsWith(":"), mark.endsWith(":")];
    return left && right ? "center" : right ? "right" : left ? "left" : null;
  });
  const rows = [];
  let end = at + 2;
  for (; end < lines.length && lines[end].trim() && !beginsBlock(lines[end]); end += 1) {
    const row = cells(lines[end]).slice(0, head.length);
    while (row.length < head.length) row.push("");
    rows.push(row);
  }
  return [{ type: "table", aligns, head, rows }, end];
}

/** Return the cells of a row; a bar behind a backslash or in a code span is text. */
function cells(line) {
  const found = [];
  let cell = "";
  let inCode = false;
  const text = line.trim().replace(/^\|/, "");
  for (let i = 0; i < text.length; i += 1) {
    if (text[i] === "\\" && text[i + 1] === "|") {
      cell += "|";
      i += 1;
    } else if (text[i] === "|" && !inCode) {
      found.push(cell.trim());
      cell = "";
    } else {
      if (text[i] === "`") inCode = !inCode && text.indexOf("`", i + 1) > 0;
      cell += text[i];
    }
  }
  if (cell.trim() || !text.endsWith("|")) found.push(cell.trim());
  return found;
}

function paragraph(lines, at, depth) {
  const inside = [lines[at].trim()];
  let end = at + 1;
  for (; end < lines.length && lines[end].trim(); end += 1) {
    const line = lines[end];
    const under = UNDERLINE.exec(line);
    if (under) {
      return [{ type: "heading", level: under[1][0] === "=" ? 1 : 2, text: inside.join("\n") }, end + 1];
    }
    if (beginsBlock(line) || (depth < DEPTH && (interrupts(line) || table(lines, end)))) break;
    inside.push(line.endsWith("  ") ? `${line.trim()}  ` : line.trim());
  }
  return [{ type: "paragraph", text: inside.join("\n").trimEnd() }, end];
}

function beginsBlock(line) {
  return fence(line) !== null || HEADING.test(line) || RULE.test(line) || QUOTE.test(line);
}

/** A list may interrupt a paragraph when its first item has text and, if numbered, the number 1. */
function interrupts(line) {
  const found = marker(line);
  return found !== null && found.indent <= 3 && found.rest.trim() !== "" && (Number.isNaN(found.number) || found.number === 1);
}

function indent(line) {
  let width = 0;
  for (const char of line) {
    if (char === " ") width += 1;
    else if (char === "\t") width += 4 - (width % 4);
    else break;
  }
  return width;
}

/** Return a line without up to `width` columns of its indent. */
function outdent(line, width) {
  let at = 0;
  let column = 0;
  while (at < line.length && column < width) {
    if (line[at] === " ") column += 1;
    else if (line[at] === "\t") column += 4 - (column % 4);
    else break;
    at += 1;
  }
  return " ".repeat(Math.max(0, column - width)) + line.slice(at);
}
