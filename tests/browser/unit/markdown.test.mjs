// The renderer of answers: what people expect of Markdown, and what hostile text must not do.

import assert from "node:assert/strict";
import test from "node:test";

import { document, elements, show } from "./fake_document.mjs";

const base = new URL("../../../src/sensorium/server/playground/static/js/markdown/", import.meta.url);
const { parseBlocks } = await import(new URL("blocks.js", base));
const { parseInline, safeAddress } = await import(new URL("inline.js", base));
const { GrowingText, Renderer } = await import(new URL("render.js", base));

const renderer = new Renderer(document);
const html = (text) => show(renderer.render(text));
/** Links without the attributes that all of them have. */
const plain = (text) => html(text).replace(/ rel="noopener noreferrer nofollow" target="_blank" title="[^"]*"/g, "");

test("paragraphs, emphasis, code and breaks", () => {
  assert.equal(html("one\n\ntwo"), "<p>one</p><p>two</p>");
  assert.equal(html("a *b* **c** ***d*** ~~e~~"), "<p>a <em>b</em> <strong>c</strong> <em><strong>d</strong></em> <del>e</del></p>");
  assert.equal(html("snake_case_name and 2*3*4 = 24"), "<p>snake_case_name and 2<em>3</em>4 = 24</p>");
  assert.equal(html("**bold with *inner* text**"), "<p><strong>bold with <em>inner</em> text</strong></p>");
  assert.equal(html("`a *b*` and ``c ` d``"), "<p><code>a *b*</code> and <code>c ` d</code></p>");
  assert.equal(html("one\ntwo"), "<p>one<br></br>two</p>");
  assert.equal(html("\\*not emphasis\\* \\<b>"), "<p>*not emphasis* <b></p>");
  assert.equal(html("unclosed **bold and `code"), "<p>unclosed **bold and `code</p>");
  assert.equal(html("2 * 3 * 4"), "<p>2 * 3 * 4</p>");
});

test("headings, rules and quotes", () => {
  assert.equal(html("# One\n### Three ###\n####### seven"), "<h3>One</h3><h4>Three</h4><p>####### seven</p>");
  assert.equal(html("Title\n=====\nsub\n---"), "<h3>Title</h3><h4>sub</h4>");
  assert.equal(html("a\n\n---\n\n***"), "<p>a</p><hr></hr><hr></hr>");
  assert.equal(html("> a\n> b\nlazy\n\nc"), "<blockquote><p>a<br></br>b<br></br>lazy</p></blockquote><p>c</p>");
  assert.equal(html("> > deep"), "<blockquote><blockquote><p>deep</p></blockquote></blockquote>");
  assert.equal(html("#hashtag"), "<p>#hashtag</p>");
});

test("lists: kinds, nesting, numbers, tasks", () => {
  assert.equal(html("- a\n- b\n  - c\n- d"), "<ul><li>a</li><li>b<ul><li>c</li></ul></li><li>d</li></ul>");
  assert.equal(html("3. a\n4. b"), '<ol start="3"><li>a</li><li>b</li></ol>');
  assert.equal(html("1. a\n   - b\n2. c"), "<ol><li>a<ul><li>b</li></ul></li><li>c</li></ol>");
  assert.equal(html("1. a\n  - b\n2. c"), "<ol><li>a<ul><li>b</li></ul></li><li>c</li></ol>");
  assert.equal(html("- a\n\n- b"), "<ul><li><p>a</p></li><li><p>b</p></li></ul>");
  assert.match(html("- [x] done\n- [ ] open"), /aria-label="done".*aria-label="open"/);
  assert.match(html("- a\n  ```py\n  x\n  ```\n- b"), /<li>a<div class="code-block">.*<code>x<\/code>.*<li>b<\/li>/);
  assert.equal(html("text\n- a"), "<p>text</p><ul><li>a</li></ul>");
  assert.equal(html("In the year\n1984. That was"), "<p>In the year<br></br>1984. That was</p>");
});

test("code blocks, also while they are written", () => {
  const block = parseBlocks("```python title\nif a < b:\n    print(`x`)\n```\nafter");
  assert.deepEqual(block.map(({ type }) => type), ["code", "paragraph"]);
  assert.equal(block[0].language, "python");
  assert.equal(block[0].text, "if a < b:\n    print(`x`)");
  assert.equal(parseBlocks("```\nnot closed\n\nstill code")[0].text, "not closed\n\nstill code");
  assert.equal(parseBlocks("~~~\n```\n~~~")[0].text, "```");
  assert.equal(parseBlocks("````\n```\n````")[0].text, "```");
});

test("a button copies the code", () => {
  const copied = [];
  const [block] = new Renderer(document, { onCopy: (text) => copied.push(text) }).render("```\na\nb\n```");
  elements([block]).find(({ tag }) => tag === "button").listeners.click();
  assert.deepEqual(copied, ["a\nb"]);
});

test("tables", () => {
  const [table] = parseBlocks("| a | b |\n|:--|--:|\n| 1 | `x|y` |\n| 2 \\| 3 |");
  assert.deepEqual(table.aligns, ["left", "right"]);
  assert.deepEqual(table.rows, [["1", "`x|y`"], ["2 | 3", ""]]);
  assert.match(html("a | b\n--- | ---\n1 | **2**\n\nend"), /<th scope="col">a<\/th>.*<td><strong>2<\/strong><\/td>.*<p>end<\/p>/);
  assert.equal(parseBlocks("a | b\nno table")[0].type, "paragraph");
});

test("mathematics is text", () => {
  assert.equal(html("so $x^2$ and \\(y_1\\)"), '<p>so <code class="math">x^2</code> and <code class="math">y_1</code></p>');
  assert.match(html("$$\na_b * c_d\n$$"), /<pre class="math"[^>]*>a_b \* c_d<\/pre>/);
  assert.equal(html("it costs $5 and then $10"), "<p>it costs $5 and then $10</p>");
});

test("links", () => {
  assert.equal(plain("[a *b*](https://example.com/x?y=1#z 'title')"), '<p><a href="https://example.com/x?y=1#z">a <em>b</em></a></p>');
  assert.equal(plain("see https://example.com/a_(b), now."), '<p>see <a href="https://example.com/a_(b)">https://example.com/a_(b)</a>, now.</p>');
  assert.equal(plain("(https://example.com)"), '<p>(<a href="https://example.com/">https://example.com</a>)</p>');
  assert.equal(plain("<mailto:a@example.com> <b@example.com>"), '<p><a href="mailto:a@example.com">mailto:a@example.com</a> <a href="mailto:b@example.com">b@example.com</a></p>');
  assert.equal(plain("[https://a.example](https://b.example)"), '<p><a href="https://b.example/">https://a.example</a></p>');
  assert.match(html("[a](https://example.com)"), /rel="noopener noreferrer nofollow" target="_blank"/);
});

test("images are never loaded", () => {
  const nodes = renderer.render("![a cat](https://evil.example/pixel.png) ![](data:image/svg+xml,<svg/>)");
  assert.deepEqual(elements(nodes).filter(({ tag }) => tag === "img"), []);
  assert.match(show(nodes), /Image: a cat/);
});

const REFUSED = [
  "javascript:alert(1)", "JaVaScRiPt:alert(1)", "java\nscript:alert(1)", "\u0001javascript:alert(1)", " javascript:alert(1)",
  "data:text/html,<script>alert(1)</script>", "vbscript:x", "file:///etc/passwd", "blob:https://a/b", "//evil.example", "/path",
  "relative", "#fragment", "https://user:password@example.com", "http://", "ftp://example.com", "javascript&colon;alert(1)", "",
];
for (const address of REFUSED) {
  test(`no link leads to ${JSON.stringify(address)}`, () => {
    assert.equal(safeAddress(address), null);
    for (const text of [`[x](${address})`, `[x](<${address}>)`, `<${address}>`, `![x](${address})`]) {
      for (const { tag, attributes } of elements(renderer.render(text))) {
        if (tag === "a") assert.match(attributes.href, /^(https?:\/\/|mailto:)/);
      }
    }
  });
}

const TAGS = new Set("p h3 h4 h5 h6 hr blockquote ul ol li div pre code span table thead tbody tr th td em strong del a br button".split(" "));
const ATTRIBUTES = new Set("class tabindex role aria-label start scope href target rel title type".split(" "));

function checkSafe(nodes) {
  for (const { tag, attributes } of elements(nodes)) {
    assert.ok(TAGS.has(tag), `an element ${tag}`);
    for (const name of Object.keys(attributes)) assert.ok(ATTRIBUTES.has(name), `an attribute ${name}`);
    if (attributes.href) assert.match(attributes.href, /^(https?:\/\/|mailto:)/);
  }
}

const HOSTILE = [
  "<script>alert(1)</script>", "<img src=x onerror=alert(1)>", "<svg/onload=alert(1)>", "<iframe src=javascript:alert(1)>",
  "[x](javascript:alert(1))", "[x](https://a.example\" onmouseover=\"alert(1))", "`</code><script>`", "```\"><script>\n</code></pre><script>alert(1)</script>\n```",
  "| <script> | b |\n|---|---|\n| <img onerror=x> | [x](javascript:y) |", "# <b onclick=x>", "- <style>*{}</style>", "&lt;script&gt; &#60;script&#62;",
  "[a]: javascript:alert(1)\n[a]", "<!-- --><script>", "\u202e\u0000\ufeff<script>", "![x](https://a.example/x.png \"onerror=y\")", "[__proto__](https://constructor.example)",
];
for (const text of HOSTILE) {
  test(`hostile text stays text: ${JSON.stringify(text)}`, () => {
    const nodes = renderer.render(text);
    checkSafe(nodes);
    if (text.includes("<script>alert")) assert.match(nodes.map((node) => node.textContent).join(""), /<script>alert/);
  });
}

const N = 60_000;
const LONG = {
  stars: "*".repeat(N), "stars and letters": "*a ".repeat(N), "stars that pair": "*a*".repeat(N), "nested emphasis": `${"*a **b ".repeat(N / 8)}${"** *".repeat(N / 8)}`,
  brackets: "[".repeat(N), "closed brackets": `${"[".repeat(N)}${"]".repeat(N)}`, "nested links": `${"[".repeat(N)}${"](https://a.example)".repeat(2000)}`, "links in brackets": "[[[[[a](https://a.example)".repeat(N / 20),
  backticks: Array.from({ length: 400 }, (_, i) => "`".repeat(i + 1)).join(" "), "backticks alike": "` `` ".repeat(N / 4), dollars: "$a ".repeat(N), "open mathematics": "\\(a ".repeat(N), "lines of mathematics": "$$ a\n".repeat(N / 4), "brackets of mathematics": "\\[ a\n".repeat(N / 4),
  quotes: "> ".repeat(N), "quotes in lines": `${"> ".repeat(200)}a\n`.repeat(200), lists: Array.from({ length: 300 }, (_, i) => `${"  ".repeat(i)}- a`).join("\n"), "one line of lists": "- ".repeat(N), numbers: "1. ".repeat(N),
  blanks: `a${" ".repeat(N)}b`, "blanks at ends": `a${" ".repeat(N)}\nb`, "delimiters": `a | b\n${"- | ".repeat(200)}${" ".repeat(N)}x`, fences: `\`\`\`${"a ".repeat(N)}\``, headings: `# ${"# ".repeat(N)}`, "long heading": `# a${" ".repeat(N)}#b`,
  tables: `${"|a".repeat(N)}\n${"|-".repeat(N)}`, "wide rows": `a|b\n-|-\n${"|".repeat(N)}`, addresses: "https://a.example/(".repeat(N / 20), "one address": `https://a.example/${"(".repeat(N)}`, underscores: "_a_b".repeat(N), tildes: "~~a".repeat(N), angles: "<".repeat(N), escapes: "\\".repeat(N), lines: "\n".repeat(N), returns: "a\r".repeat(N), "rules": "- ".repeat(N) + "x",
  "targets": "[a](" .repeat(N / 4), "titles": "[a](b \"".repeat(N / 8), "surrogates": "\ud800".repeat(N),
};
for (const [name, text] of Object.entries(LONG)) {
  // Processor time, not that of a clock, with a floor below which it says nothing; linear is a factor of two.
  test(`time grows with the length: ${name}`, () => {
    const time = (part) => {
      const began = process.cpuUsage();
      checkSafe(renderer.render(part));
      const { user, system } = process.cpuUsage(began);
      return (user + system) / 1000;
    };
    time(text.slice(0, 2000));
    const half = Math.min(time(text.slice(0, text.length / 2)), time(text.slice(0, text.length / 2)));
    const whole = Math.min(time(text), time(text));
    assert.ok(whole < 3.5 * Math.max(half, 200), `${half.toFixed(0)} ms for a half, ${whole.toFixed(0)} ms for all`);
  });
}

test("depth is bounded, whatever is nested", () => {
  const depth = (nodes) => nodes.reduce((most, node) => Math.max(most, 1 + depth(node.childNodes)), 0);
  for (const text of [LONG["nested emphasis"], LONG.quotes, LONG.lists, LONG["one line of lists"], "*a **a ".repeat(50) + "a** a*".repeat(50)]) {
    assert.ok(depth(renderer.render(text)) < 80);
  }
});

test("random text keeps all its words and makes nothing else", () => {
  const pieces = ["*", "**", "_", "`", "```\n", "[", "](", ")", "https://a.example", "<b>", "\n", "\n\n", "> ", "- ", "1. ", "|", "|-|-|\n", "$", "\\", "word", "# ", " ", "~~", "!["];
  let seed = 7;
  const next = () => (seed = (seed * 1103515245 + 12345) % 2147483648);
  for (let round = 0; round < 3000; round += 1) {
    const text = Array.from({ length: 1 + (next() % 40) }, () => pieces[next() % pieces.length]).join("");
    const nodes = renderer.render(text);
    checkSafe(nodes);
    const shown = nodes.map((node) => node.textContent).join("");
    const words = (from) => (from.match(/word/g) ?? []).length;
    assert.ok(words(shown) <= words(text));
  }
});

test("a growing answer keeps the blocks that do not change", () => {
  const element = document.createElement("div");
  const growing = new GrowingText(element, renderer);
  growing.update("one\n\ntwo");
  const [first, second] = element.childNodes;
  growing.update("one\n\ntwo and more\n\n- three");
  assert.equal(element.childNodes[0], first);
  assert.notEqual(element.childNodes[1], second);
  assert.equal(element.childNodes.length, 3);
  growing.update("one");
  assert.equal(element.childNodes.length, 1);
  assert.equal(show(element.childNodes), "<p>one</p>");
});

test("inline nodes of plain text are one", () => {
  assert.deepEqual(parseInline("plain").map(({ type, text }) => [type, text]), [["text", "plain"]]);
});

test("headings skip no rank, and those in quotes have none", () => {
  assert.equal(html("### a\n# b\n###### c\n> # d"), "<h3>a</h3><h3>b</h3><h4>c</h4><blockquote><p><strong>d</strong></p></blockquote>");
});
