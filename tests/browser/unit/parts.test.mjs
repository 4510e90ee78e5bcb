// The parts of the page that need no browser: conversations, requests, events, metrics, figures.

import assert from "node:assert/strict";
import { spawnSync } from "node:child_process";
import { mkdtempSync, readdirSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import test from "node:test";

const base = new URL("../../../src/sensorium/server/playground/static/js/", import.meta.url);
const conversations = await import(new URL("chat/conversation.js", base));
const { attachmentAt, chatBody, snippets } = await import(new URL("chat/request.js", base));
const { key } = await import(new URL("lib/api.js", base));
const { partsOf } = await import(new URL("chat/timing.js", base));
const { EventReader } = await import(new URL("lib/sse.js", base));
const { Scrape, growth, quantile, rate } = await import(new URL("lib/prometheus.js", base));
const format = await import(new URL("lib/format.js", base));
const { addMessage, newConversation, parseExport, path, showBranch, siblings } = conversations;

test("a conversation branches and nothing is lost", () => {
  const talk = newConversation();
  const first = addMessage(talk, null, "user", "one");
  const answer = addMessage(talk, first.id, "assistant", "1");
  const again = addMessage(talk, first.id, "assistant", "uno");
  assert.deepEqual(path(talk).map(({ text }) => text), ["one", "uno"]);
  assert.deepEqual(siblings(talk, again).map(({ text }) => text), ["1", "uno"]);
  const more = addMessage(talk, answer.id, "user", "two");
  showBranch(talk, again);
  assert.deepEqual(path(talk).map(({ text }) => text), ["one", "uno"]);
  showBranch(talk, answer);
  assert.equal(talk.leaf, more.id);
  assert.equal(talk.title, "one");
});

test("an export is read back with other ids", () => {
  const talk = newConversation("demo");
  const file = { id: "a", kind: "image", name: "x.png", type: "image/png", size: 3, file: "f1" };
  const first = addMessage(talk, null, "user", "look", [file]);
  const answer = addMessage(talk, first.id, "assistant", "a square");
  answer.answer = { finish: "stop", usage: { prompt_tokens: 3 }, tokens: [{ t: "a", p: 0.5, top: [["a", 0.5]] }] };
  const text = JSON.stringify({ format: conversations.FORMAT, version: 1, conversations: [talk], files: { f1: "data:image/png;base64,AAAA" } });
  const { conversations: [read], files } = parseExport(text);
  assert.notEqual(read.id, talk.id);
  assert.deepEqual(path(read).map((m) => m.text), ["look", "a square"]);
  assert.equal(path(read)[1].answer.usage.prompt_tokens, 3);
  assert.deepEqual(path(read)[1].answer.tokens, [{ t: "a", p: 0.5, top: [["a", 0.5]] }]);
  assert.deepEqual([...files.values()], [{ type: "image/png", base64: "AAAA" }]);
  assert.equal(path(read)[0].attachments[0].file, [...files.keys()][0]);
});

for (const [name, text] of Object.entries({
  "no JSON": "{", "another format": "{}", "a list": "[]", null: "null", "another version": JSON.stringify({ format: conversations.FORMAT, version: 9 }),
  "too many": JSON.stringify({ format: conversations.FORMAT, version: 1, conversations: Array(1001).fill({}) }),
})) {
  test(`an import refuses ${name} with a sentence`, () => {
    assert.throws(() => parseExport(text), (error) => /^[A-Z].*\.$/.test(error.message));
  });
}

test("an import takes nothing that is out of form", () => {
  const odd = {
    format: conversations.FORMAT, version: 1, files: { a: "data:text/html,x", b: "https://evil.example", c: "data:image/png;base64,AA==" },
    conversations: [null, 3, {
      title: { a: 1 }, messages: {
        1: { id: "1", role: "system", text: "x" }, 2: { id: "2", role: "user", text: 7, parent: "2", attachments: [{ kind: "exe", file: "c" }, { kind: "image", file: "a" }, { kind: "image", file: "c", name: 3 }] },
        3: { id: "3", role: "assistant", text: "ok", parent: "2", answer: { error: "x", metrics: { a: { b: { c: { d: { e: 1 } } } } }, usage: JSON.parse('{"__proto__": {"polluted": 1}}') } },
      },
    }],
  };
  const { conversations: [read], files } = parseExport(JSON.stringify(odd));
  assert.equal(files.size, 1);
  assert.equal(read.title, "");
  const [user, assistant] = path(read);
  assert.equal(user.text, "");
  assert.equal(user.attachments.length, 1);
  assert.equal(assistant.text, "ok");
  assert.equal(assistant.answer.error, undefined);
  assert.equal({}.polluted, undefined);
});

const PICTURE = { id: "p", kind: "image", name: "it's $(a) `b`.png", type: "image/png" };
const PARAMETERS = {
  model: "demo", system: "Be brief.", settings: { temperature: 0.5, top_k: 3, stop: "END\n\\n\\n" }, logprobs: true,
  messages: [{ role: "user", text: "What's $HOME?", attachments: [PICTURE] }, { role: "assistant", text: "", attachments: [] }],
};

test("the body of a request", () => {
  const places = new Map();
  const body = chatBody(PARAMETERS, () => "data:image/png;base64,AA==", places);
  assert.deepEqual(body.messages, [
    { role: "system", content: "Be brief." },
    { role: "user", content: [{ type: "image_url", image_url: { url: "data:image/png;base64,AA==" } }, { type: "text", text: "What's $HOME?" }] },
  ]);
  assert.deepEqual([body.temperature, body.top_k, body.stop, body.top_logprobs, body.stream, body.return_metrics], [0.5, 3, ["END", "\n\n"], 5, true, true]);
  assert.equal(attachmentAt(places, "messages[1].content[0].image_url.url"), "p");
  assert.equal(attachmentAt(places, "messages[1].content[0]"), "p");
  assert.equal(attachmentAt(places, "messages[1].content[01]"), null);
  assert.equal(attachmentAt(places, null), null);
});

test("a document is a file part", () => {
  const messages = [{ role: "user", text: "", attachments: [{ id: "d", kind: "document", name: "a.pdf", type: "application/pdf" }] }];
  const body = chatBody({ model: "m", system: "", messages }, () => "data:application/pdf;base64,AA==");
  assert.deepEqual(body.messages[0].content, [{ type: "file", file: { filename: "a.pdf", file_data: "data:application/pdf;base64,AA==" } }]);
});

test("events come out of pieces that are cut anywhere", () => {
  const bytes = new TextEncoder().encode('data: {"a":"ä€"}\r\n\r\n: comment\n\ndata: one\ndata: two\n\ndata: [DONE]\n\n');
  for (let size = 1; size < 12; size += 1) {
    const reader = new EventReader();
    const found = [];
    for (let at = 0; at < bytes.length; at += size) found.push(...reader.feed(bytes.slice(at, at + size)));
    found.push(...reader.end());
    assert.deepEqual(found, ['{"a":"ä€"}', "one\ntwo", "[DONE]"]);
  }
});

const scrape = (text, time) => new Scrape(text, "sensorium:", time);
test("metrics: sums, rates and quantiles", () => {
  const before = scrape('sensorium:t_total{a="x"} 10\nsensorium:t_total{a="y,}\\""} 5\nsensorium:s_bucket{le="0.1"} 0\nsensorium:s_bucket{le="1.0"} 0\nsensorium:s_bucket{le="+Inf"} 0\n', 0);
  const now = scrape('# HELP x\nsensorium:t_total{a="x"} 30\nsensorium:t_total{a="y,}\\""} 5\nsensorium:s_bucket{le="0.1"} 5\nsensorium:s_bucket{le="1.0"} 10\nsensorium:s_bucket{le="+Inf"} 10\n', 2000);
  assert.equal(now.sum("t_total"), 35);
  assert.equal(now.sum("t_total", { a: 'y,}"' }), 5);
  assert.equal(now.sum("absent"), null);
  assert.equal(rate(before, now, "t_total"), 10);
  assert.equal(growth(now, before, "t_total"), 15, "a restarted counter counts from 0");
  assert.equal(quantile(before, now, "s", 0.5), 0.1);
  assert.ok(Math.abs(quantile(before, now, "s", 0.75) - 0.55) < 1e-9);
  assert.equal(quantile(now, now, "s", 0.5), null);
});

test("the parts of the time add up to the whole", () => {
  const parts = partsOf({
    prepare_seconds: 0.1, queue_seconds: 0.01, encode_seconds: 0.2, prefill_seconds: 0.3, decode_seconds: 1,
    items: [{ fetch_seconds: 0.1, decode_seconds: 0.1, preprocess_seconds: 0 }, { fetch_seconds: 0.1, decode_seconds: 0.1, preprocess_seconds: 0 }],
  });
  const total = Object.values(parts).reduce((sum, value) => sum + value, 0);
  assert.ok(Math.abs(total - 1.61) < 1e-9);
  assert.ok(Math.abs(parts.fetch - 0.05) < 1e-9);
  assert.equal(parts.render, 0);
});

test("figures as people read them", () => {
  assert.deepEqual([0.0004, 0.0423, 1.304, 12.34, 125].map(format.seconds), ["0.4 ms", "42 ms", "1.30 s", "12.3 s", "2 min 5 s"]);
  assert.deepEqual([512, 1400, 2_500_000].map(format.bytes), ["512 B", "1.4 kB", "2.5 MB"]);
  assert.equal(format.count(1234567), "1\u202f234\u202f567");
  assert.equal(format.seconds(null), "–");
});

test("code asks for what the page asks for", async () => {
  const codes = snippets(PARAMETERS, "http://127.0.0.1:8000/", true);
  assert.ok(codes.curl.includes("What's \\$HOME?"));
  assert.ok(codes.curl.includes("$(base64 -w0 'it'\\''s $(a) `b`.png')"));
  assert.ok(codes.curl.includes("$SENSORIUM_API_KEY"));
  assert.ok(codes.python.includes('data_url("image/png", "it\'s $(a) `b`.png")'));
  assert.ok(codes.python.includes("extra_body={"));
  for (const code of Object.values(codes)) assert.ok(!code.includes("\ue0f7"));
});

/** Run the copied line in a shell whose curl prints the body; return the body. */
function pasted(code) {
  const folder = mkdtempSync(join(tmpdir(), "paste-"));
  try {
    writeFileSync(join(folder, "x.png"), "picture");
    const shell = spawnSync("sh", ["-c", `curl() { cat; }\n${code}`], { cwd: folder, encoding: "utf8" });
    assert.deepEqual(readdirSync(folder), ["x.png"], "the shell ran something else");
    return JSON.parse(shell.stdout);
  } finally {
    rmSync(folder, { recursive: true });
  }
}

const COMMAND = "$(touch ran)`touch ran`";
const FORGED = `\ue0f7${COMMAND}\ue0f7/etc/passwd\ue0f7`;
for (const [name, messages] of Object.entries({
  "a text": [{ role: "user", text: FORGED, attachments: [] }],
  "an answer": [{ role: "user", text: "Hi", attachments: [] }, { role: "assistant", text: FORGED, attachments: [] }, { role: "user", text: "Go on", attachments: [] }],
  "a name": [{ role: "user", text: "", attachments: [{ ...PICTURE, name: `${FORGED}/x.png` }] }],
  "a media type": [{ role: "user", text: "", attachments: [{ ...PICTURE, name: "x.png", type: `image/${COMMAND}"'\\` }] }],
  "a forged media type": [{ role: "user", text: "", attachments: [{ ...PICTURE, name: "x.png", type: FORGED }] }],
  "a document's name": [{ role: "user", text: "", attachments: [{ ...PICTURE, kind: "document", name: `${FORGED}/x.png` }] }],
})) {
  test(`code runs nothing that ${name} says and reads no file that it names`, () => {
    const codes = snippets({ ...PARAMETERS, system: FORGED, settings: { stop: FORGED }, model: FORGED, messages }, "http://127.0.0.1:8000/", false);
    const body = pasted(codes.curl);
    assert.equal(body.model, `${COMMAND}/etc/passwd`);
    assert.equal(body.messages[1].role, "user");
    for (const part of [body.messages[1].content].flat()) {
      const url = part.image_url?.url ?? part.file?.file_data;
      if (url) assert.ok(url.endsWith(`;base64,${btoa("picture")}`));
    }
    const literal = `("(?:[^"\\\\]|\\\\.)*")`;
    for (const [language, name] of [["python", "data_url"], ["javascript", "dataUrl"]]) {
      const read = [...codes[language].matchAll(new RegExp(`${name}\\(${literal}, ${literal}\\)`, "g"))];
      assert.deepEqual(read.map(([, , file]) => JSON.parse(file)), messages.flatMap((message) => message.attachments.map(() => "x.png")));
    }
  });
}

test("an import's media types are media types", () => {
  const attachments = [`image/$(x)`, "image/png;a=b", "image/png\n", "image/webp"].map((type) => ({ kind: "image", name: "a", type, file: "f" }));
  const text = JSON.stringify({
    format: conversations.FORMAT, version: 1, files: { f: "data:image/png;base64,AAAA" },
    conversations: [{ messages: { 1: { id: "1", role: "user", text: "", attachments } } }],
  });
  const { conversations: [read] } = parseExport(text);
  assert.deepEqual(path(read)[0].attachments.map(({ type }) => type), ["image/png", "image/png", "image/png", "image/webp"]);
});

test("a turn whose answer failed is left out, but for the last", () => {
  const turn = (role, text) => ({ role, text, attachments: [] });
  const said = (...messages) => chatBody({ model: "m", system: "", messages }, () => "").messages.map(({ content }) => content);
  assert.deepEqual(said(turn("user", "1"), turn("assistant", ""), turn("user", "2")), ["2"]);
  assert.deepEqual(said(turn("user", "1"), turn("assistant", "a"), turn("user", "2"), turn("assistant", "")), ["1", "a", "2"]);
});

test("the key lasts as long as the page where nothing can be stored", () => {
  const names = ["sessionStorage", "localStorage"];
  const before = names.map((name) => [name, Object.getOwnPropertyDescriptor(globalThis, name)]);
  const get = () => {
    throw new Error("SecurityError");
  };
  for (const name of names) Object.defineProperty(globalThis, name, { get, configurable: true });
  try {
    assert.equal(key.get(), "");
    for (const isToStay of [true, false]) {
      key.set("secret", isToStay);
      assert.deepEqual([key.get(), key.isKept()], ["secret", false]);
    }
    key.set("", false);
    assert.equal(key.get(), "");
  } finally {
    for (const [name, descriptor] of before) descriptor ? Object.defineProperty(globalThis, name, descriptor) : delete globalThis[name];
  }
});
