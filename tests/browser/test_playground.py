"""The playground in a browser, on the demo models: what people do with it."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.browser import media
from tests.browser.conftest import Watched
from tests.browser.waiting import until
from tests.e2e.serving import Server

pytestmark = pytest.mark.slow

ANSWER = ".message-assistant:not(.is-running)"
WATCH = Callable[..., Watched]


def ask(page: Any, text: str, count: int = 1) -> Any:
    """Send a message; return the view of its answer when it is complete."""
    page.get_by_label("Message", exact=True).fill(text)
    page.keyboard.press("Enter")
    return done(page, count)


def done(page: Any, count: int = 1) -> Any:
    """The last answer, when there are ``count`` complete ones."""
    until(
        page,
        "([selector, count]) => document.querySelectorAll(selector).length === count && "
        "!document.querySelector('.is-running')",
        [ANSWER, count],
    )
    return page.locator(ANSWER).last


def prose(answer: Any) -> str:
    """Its words."""
    return str(answer.locator(".prose").inner_text()).strip()


def test_an_answer_streams_with_its_figures(watched: WATCH, demo: Server) -> None:
    page = watched().open(demo.url)
    assert page.title() == "demo – Sensorium"
    page.evaluate(
        "() => { window.seen = new Set(); new MutationObserver(() => "
        "seen.add(document.querySelector('.prose')?.textContent)).observe(document.body, "
        "{childList: true, subtree: true, characterData: true}); }"
    )
    answer = ask(page, "Who are you?")
    assert "demo model" in prose(answer)
    for figure in ("tokens/s", "to first token", "prompt tokens cached"):
        assert figure in answer.locator(".figures").inner_text()
    label = answer.locator(".bar").get_attribute("aria-label")
    assert "prefill" in label
    assert "generate" in label
    answer.locator(".timing summary").click()
    assert answer.locator(".times").is_visible()
    again = ask(page, "Who are you?", 2)
    assert not again.locator(".figures").inner_text().startswith("0 of")


def drop(page: Any, path: Path, media_type: str) -> None:
    """Drop a file on the conversation."""
    transfer = page.evaluate_handle(
        """([data, name, type]) => {
            const bytes = Uint8Array.from(atob(data), (char) => char.charCodeAt(0));
            const transfer = new DataTransfer();
            transfer.items.add(new File([bytes], name, { type }));
            return transfer;
        }""",
        [base64.b64encode(path.read_bytes()).decode(), path.name, media_type],
    )
    for event in ("dragenter", "dragover", "drop"):
        page.dispatch_event(".chat", event, {"dataTransfer": transfer})


def paste(page: Any, path: Path, media_type: str) -> None:
    """Paste a file into the field."""
    page.evaluate(
        """([data, name, type]) => {
            const bytes = Uint8Array.from(atob(data), (char) => char.charCodeAt(0));
            const transfer = new DataTransfer();
            transfer.items.add(new File([bytes], name, { type }));
            document.querySelector('.composer textarea').dispatchEvent(
                new ClipboardEvent('paste', { clipboardData: transfer, bubbles: true, cancelable: true }));
        }""",
        [base64.b64encode(path.read_bytes()).decode(), path.name, media_type],
    )


def pick(page: Any, path: Path, media_type: str) -> None:
    """Pick a file in the system's dialog."""
    with page.expect_file_chooser() as chooser:
        page.get_by_label("Attach files").click()
    chooser.value.set_files(path)


@pytest.mark.parametrize("attach", [drop, paste, pick])
def test_a_picture(watched: WATCH, demo: Server, folder: Path, attach: Any) -> None:
    given = media.picture(folder)
    page = watched().open(demo.url)
    attach(page, given.path, "image/png")
    page.wait_for_selector(".tray-item img")
    answer = ask(page, given.question)
    assert prose(answer) == given.answer
    assert page.locator(".attachment img").evaluate("image => image.naturalWidth") > 0


def test_a_clip_and_the_frames_that_the_model_sees(
    watched: WATCH, demo: Server, folder: Path
) -> None:
    given = media.clip(folder)
    page = watched().open(demo.url)
    pick(page, given.path, "")
    page.wait_for_selector(".tray-item")
    answer = ask(page, given.question)
    assert prose(answer) == given.answer
    until(page, "document.querySelectorAll('.frame canvas').length >= 4")
    assert re.match(
        r"The model sees \d+ frames of \d+", page.locator(".frames figcaption").inner_text()
    )
    drawn = page.locator(".frame canvas").evaluate_all(
        "all => all.map((one) => one.getContext('2d').getImageData(0, 0, one.width, one.height).data.join())"
    )
    assert len(set(drawn)) > 1, "the frames differ"
    assert "frames" in answer.locator(".items").text_content()


def test_a_sound(watched: WATCH, several: Server, folder: Path) -> None:
    given = media.sound(folder)
    watched_one = watched()
    page = watched_one.open(several.url)
    assert (
        page.get_by_label("Use the camera").count() == 0
        or not page.get_by_label("Use the camera").is_visible()
    )
    pick(page, given.path, "")
    page.wait_for_selector(".tray-item")
    assert prose(ask(page, given.question)) == given.answer
    assert page.locator(".attachment audio").count() == 1
    page.get_by_label("New conversation").or_(page.get_by_text("New conversation")).first.click()
    page.get_by_label("Record a sound").click()
    page.get_by_text("Stop and use it").click()
    page.wait_for_selector(".tray-item")


def test_camera(watched: WATCH, demo: Server) -> None:
    page = watched().open(demo.url)
    page.get_by_label("Use the camera").click()
    until(page, "document.querySelector('.camera')?.videoWidth > 0")
    page.get_by_text("Take a photo").click()
    page.wait_for_selector(".tray-item img")
    assert page.locator("dialog").count() == 0
    page.get_by_label("Use the camera").click()
    until(page, "document.querySelector('.camera')?.videoWidth > 0")
    page.get_by_text("Record a clip").click()
    until(page, "/0:0[1-9]/.test(document.querySelector('.record-time').textContent)")
    page.get_by_role("button", name="Stop", exact=True).click()
    until(page, "document.querySelectorAll('.tray-item').length === 2")
    assert prose(ask(page, "What moves?"))
    until(page, "document.querySelectorAll('.frame canvas').length >= 2")


def test_a_document(watched: WATCH, demo: Server, folder: Path) -> None:
    page = watched().open(demo.url)
    given = media.document(folder)
    drop(page, given.path, "application/pdf")
    page.wait_for_selector(".tray-item")
    assert prose(ask(page, given.question)) == given.answer


def test_stop(watched: WATCH, demo: Server) -> None:
    page = watched().open(demo.url)
    body: dict[str, Any] = {}
    page.evaluate(
        "localStorage.setItem('sensorium.settings', JSON.stringify({sampling: {max_tokens: 1900, temperature: 2}}))"
    )

    def endless(route: Any) -> None:
        body.update(json.loads(route.request.post_data), ignore_eos=True)
        route.continue_(post_data=json.dumps(body))

    page.route("**/v1/chat/completions", endless)
    page.reload()
    page.get_by_label("Message", exact=True).fill("Who are you?")
    page.keyboard.press("Enter")
    until(page, "document.querySelector('.is-running .prose')?.textContent.length > 20")
    page.keyboard.press("Escape")
    answer = done(page)
    assert "Stopped." in answer.inner_text()
    assert len(prose(answer)) > 20
    assert page.get_by_label("Send", exact=True).is_visible()


def test_an_error_is_a_sentence(watched: WATCH, demo: Server, folder: Path) -> None:
    one = watched()
    page = one.open(demo.url)
    broken = folder / "broken.png"
    broken.write_bytes(b"\x89PNG\r\n\x1a\n and no more")
    pick(page, broken, "")
    page.wait_for_selector(".tray-item")
    answer = ask(page, "What is it?")
    error = answer.locator("[role=alert]").inner_text()
    assert error.startswith("broken.png: ")
    assert error.endswith(".")
    text = folder / "notes.txt"
    text.write_text("words")
    pick(page, text, "")
    assert "this model takes no such files" in page.locator(".toast-error").inner_text()
    one.complaints.clear()  # the browser itself tells of a picture it cannot show and of a status of 400


def test_a_reload_keeps_the_conversation(watched: WATCH, demo: Server, folder: Path) -> None:
    given = media.picture(folder)
    page = watched().open(demo.url)
    pick(page, given.path, "")
    page.wait_for_selector(".tray-item")
    ask(page, given.question)
    page.wait_for_selector(".conversation")
    page.reload()
    page.wait_for_selector(".conversation")
    page.locator(".conversation").first.click()
    assert prose(done(page)) == given.answer
    assert (
        "tokens/s" in page.locator(".figures").inner_text()
        or "token" in page.locator(".figures").inner_text()
    )
    page.wait_for_selector(".attachment img")


def test_edit_try_again_branch_export_import(watched: WATCH, demo: Server, tmp_path: Path) -> None:
    page = watched().open(demo.url)
    ask(page, "Hello!")
    page.get_by_label("Edit the message").click()
    page.get_by_label("New text of the message").fill("Who are you?")
    page.keyboard.press("Enter")
    assert "demo model" in prose(done(page))
    page.get_by_label("Earlier version").click()
    assert page.locator(".bubble").inner_text() == "Hello!"
    page.get_by_label("Later version").click()
    assert page.locator(".bubble").inner_text() == "Who are you?"
    page.get_by_label("Try again").click()
    until(
        page,
        "document.querySelectorAll('.branches').length === 2 && !document.querySelector('.is-running')",
    )
    page.locator(".message-assistant").get_by_label("Branch into a new conversation").click()
    until(page, "document.querySelectorAll('.conversation').length === 2")
    with page.expect_download() as download:
        page.get_by_label("Export all conversations").click()
    path = tmp_path / "export.json"
    download.value.save_as(path)
    assert len(json.loads(path.read_text())["conversations"]) == 2
    page.get_by_label("Remove all conversations").click()
    page.get_by_role("button", name="Remove all", exact=True).click()
    until(page, "document.querySelectorAll('.conversation').length === 0")
    page.get_by_label("File of conversations").set_input_files(path)
    until(page, "document.querySelectorAll('.conversation').length === 2")


def test_a_removed_conversation_stays_removed(watched: WATCH, demo: Server) -> None:
    page = watched().open(demo.url)
    page.route("**/v1/chat/completions", lambda route: None)  # its answer would never end
    page.get_by_label("Message", exact=True).fill("Who are you?")
    page.keyboard.press("Enter")
    page.wait_for_selector(".is-running")
    page.get_by_label("Remove Who are you?").press("Enter")
    page.get_by_role("button", name="Remove", exact=True).click()
    until(page, "document.querySelectorAll('.message').length === 0")
    until(page, "!document.querySelector('[aria-label=Send]').hidden")
    page.reload()
    page.wait_for_selector("#model b")
    assert page.locator(".conversation").count() == 0


TABS = """async ([step, id]) => {
    const { Store } = await import(document.querySelector('link[href$="lib/store.js"]').href);
    window.store ??= await Store.load();
    const holder = { id, updated: 1, messages: { m: { attachments: [{ file: `1-${id}`, size: 1 }] } } };
    const files = new Map([[`1-${id}`, { type: 'image/png', base64: 'AA==' }]]);
    const acts = {
        adopt: () => store.adopt({ conversations: [holder], files }),
        orphan: () => store.adopt({ conversations: [], files }),
        attach: async () => (window.attached = await store.addFile(new Blob(['x']))),
        discard: () => store.discard(window.attached),
        remove: () => store.remove(id),
        load: () => Store.load(),
    };
    await acts[step]();
    const database = await new Promise((resolve) => {
        indexedDB.open('sensorium', 1).onsuccess = ({ target }) => resolve(target.result);
    });
    return new Promise((resolve) => {
        const request = database.transaction('files').objectStore('files').getAllKeys();
        request.onsuccess = () => {
            database.close();
            resolve(request.result.map((one) => (one.startsWith('1-') ? one : 'young')));
        };
    });
}"""
"""A step in a tab's store; returns the ids of all stored files. Files ``1-...`` are from 1970."""


def test_tabs_leave_each_other_their_files(watched: WATCH, demo: Server) -> None:
    one = watched()
    first, second = one.open(demo.url), one.open(demo.url)
    first.evaluate(TABS, ["adopt", "a"])
    second.evaluate(TABS, ["adopt", "b"])
    second.evaluate(TABS, ["attach", ""])
    assert first.evaluate(TABS, ["orphan", "c"]) == ["1-a", "1-b", "1-c", "young"]
    assert first.evaluate(TABS, ["remove", "a"]) == ["1-b", "young"]
    assert second.evaluate(TABS, ["discard", ""]) == ["1-b"]
    assert second.evaluate(TABS, ["orphan", "d"]) == ["1-b", "1-d"]
    assert second.evaluate(TABS, ["load", ""]) == ["1-b"]


def test_a_photo_needs_no_microphone(watched: WATCH, demo: Server) -> None:
    page = watched().open(demo.url)
    page.evaluate(
        """() => {
            const { mediaDevices } = navigator;
            const all = mediaDevices.getUserMedia.bind(mediaDevices);
            mediaDevices.getUserMedia = async (wanted) => {
                if (wanted.audio) throw new DOMException('none', 'NotFoundError');
                return all(wanted);
            };
        }"""
    )
    page.get_by_label("Use the camera").click()
    until(page, "document.querySelector('.camera')?.videoWidth > 0")
    page.get_by_text("Take a photo").click()
    page.wait_for_selector(".tray-item img")


def test_probabilities_settings_and_code(watched: WATCH, demo: Server) -> None:
    page = watched().open(demo.url)
    page.get_by_label("Settings").click()
    page.get_by_label("Ask for token probabilities").check()
    page.get_by_label("Temperature").fill("0")
    page.get_by_label("System prompt").fill("You answer questions.")
    page.keyboard.press("Escape")
    answer = ask(page, "Who are you?")
    answer.get_by_label("Show token probabilities").click()
    assert answer.locator(".token").count() > 3
    answer.locator(".tokens").focus()
    page.keyboard.press("ArrowRight")
    assert answer.locator(".alternatives li").count() >= 5
    assert "%" in answer.locator(".alternatives").inner_text()
    answer.get_by_label("Show the request as code").click()
    code = page.locator("[role=tabpanel]")
    assert "curl http://127.0.0.1:" in code.inner_text()
    assert '"You answer questions."' in code.inner_text()
    page.keyboard.press("Tab")
    page.get_by_role("tab", name="curl").focus()
    page.keyboard.press("ArrowRight")
    assert "from openai import OpenAI" in code.inner_text()
    assert "temperature=0" in code.inner_text()


def test_a_key_is_asked_for(watched: WATCH, serve: Callable[..., Server]) -> None:
    server = serve("demo-audio", "--api-key", "right")
    one = watched()
    page = one.context.new_page()
    page.goto(server.url)
    field = page.get_by_label("API key")
    field.wait_for()
    assert "needs an API key" in page.locator("#model").inner_text()
    assert page.evaluate("document.activeElement.type") == "password"
    page.keyboard.type("right")
    page.keyboard.press("Tab")
    page.wait_for_selector("#model b")
    page.keyboard.press("Escape")
    assert prose(ask(page, "Who are you?"))
    one.complaints.clear()  # the browser tells of the status of 401


def test_the_server_page_draws_charts(watched: WATCH, demo: Server) -> None:
    page = watched().open(demo.url)
    ask(page, "Who are you?")
    page.get_by_role("link", name="Server").click()
    until(
        page,
        "[...document.querySelectorAll('.chart-drawing')].filter((one) => /\\d/.test(one.getAttribute('aria-label'))).length >= 4",
    )
    assert "demo is served by version" in page.locator(".server-status").inner_text()
    memory = page.locator(".chart-drawing[aria-label^=Memory]").get_attribute("aria-label") or ""
    assert re.search(r"engine [\d.]+ [MG]B, server [\d.]+ [MG]B, media", memory), memory
    until(page, "document.querySelector('.chart-line').getAttribute('d')?.includes('L')")
    page.get_by_text("Pause").click()
    page.get_by_role("link", name="Chat").click()
    until(page, "document.querySelectorAll('.message-assistant').length === 1")


def test_embeddings(watched: WATCH, several: Server, folder: Path) -> None:
    page = watched().open(several.url)
    page.get_by_label("Model", exact=True).select_option("vectors")
    page.get_by_role("button", name="Compare").wait_for()
    assert page.get_by_role("link", name="Chat").count() == 0
    page.get_by_label("Image").first.set_input_files(media.picture(folder).path)
    page.get_by_role("button", name="Compare").click()
    page.wait_for_selector(".similarity")
    values = [float(text) for text in page.locator(".similarity").all_inner_texts()]
    assert len(values) == 4
    assert values[0] == values[3] == 1.0
    assert values[1] == values[2] < 1.0


def test_several_models(watched: WATCH, several: Server, axe: Callable[[Any, str], None]) -> None:
    """A conversation remembers its model, and the server's page shows the state of each."""
    one = watched()
    page = one.open(several.url)
    choice = page.get_by_label("Model", exact=True)
    assert choice.input_value() == "listener"
    assert prose(ask(page, "Who are you?"))
    choice.select_option("vectors")
    page.get_by_role("button", name="Compare").click()
    page.wait_for_selector(".similarity")  # which has loaded the model
    page.reload()
    page.get_by_role("button", name="Compare").wait_for()
    assert choice.input_value() == "vectors"
    page.locator("#conversations button").get_by_text("Who are you?").click()
    page.wait_for_selector(ANSWER)
    assert choice.input_value() == "listener"
    page.get_by_role("link", name="Server").click()
    page.wait_for_selector(".models tbody td")
    names = page.locator(".models tbody th").all_inner_texts()
    states = page.locator(".models tbody td").all_inner_texts()
    assert dict(zip(names, states, strict=True)) == {"listener": "ready", "vectors": "ready"}
    axe(page, "several-models")


def test_by_keyboard_alone(watched: WATCH, demo: Server) -> None:
    """From the top of the page to an answer, to its figures, to the settings and back."""
    page = watched().open(demo.url)
    page.evaluate("document.activeElement.blur()")

    def walk_to(label: str) -> None:
        for _ in range(60):
            page.keyboard.press("Tab")
            name = page.evaluate(
                "document.activeElement === document.body ? '' : "
                "document.activeElement.getAttribute('aria-label') ?? document.activeElement.textContent"
            )
            if name.strip().startswith(label):
                outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
                assert outline != "none" or label == "Message"
                return
        raise AssertionError(f"no way to {label!r} by Tab")

    walk_to("Skip to the content")
    walk_to("Message")
    page.keyboard.type("Who are you?")
    page.keyboard.press("Enter")
    assert "demo model" in prose(done(page))
    page.keyboard.press("ArrowUp")
    assert (
        page.evaluate("document.activeElement.getAttribute('aria-label')")
        == "New text of the message"
    )
    page.keyboard.press("Escape")
    page.keyboard.press("Control+,")
    page.wait_for_selector("dialog[open]")
    page.keyboard.press("Escape")
    page.keyboard.press("Control+Shift+O")
    until(page, "document.querySelectorAll('.message').length === 0")
    assert page.evaluate("document.activeElement.getAttribute('aria-label')") == "Message"


def test_high_contrast(watched: WATCH, demo: Server, folder: Path, axe: Any) -> None:
    """Forced colours: what only a colour tells has its own, and what is pressed has an edge."""
    page = watched(forced_colors="active").open(demo.url)
    assert page.evaluate("matchMedia('(forced-colors: active)').matches")
    given = media.picture(folder)
    pick(page, given.path, "image/png")
    page.wait_for_selector(".tray-item img")
    ask(page, given.question)
    axe(page, "high contrast")
    colours = "all => all.map((one) => getComputedStyle(one).backgroundColor)"
    parts = page.locator(".bar i").evaluate_all(colours)
    assert len(set(parts)) == len(parts) > 1
    edges = "all => all.map((one) => getComputedStyle(one).borderTopStyle)"
    for selector in (".bubble", ".composer", ".send"):
        assert set(page.locator(selector).evaluate_all(edges)) == {"solid"}, selector


VIEWS = [
    pytest.param({"width": 390, "height": 844}, id="phone"),
    pytest.param({"width": 1280, "height": 800}, id="desktop"),
]
MARKDOWN = """## Result

Some **bold** and `code`, [a link](https://example.com), $x^2$.

1. one
   - inner
2. two

| shape | count |
|:--|--:|
| circle | 2 |

```python
print("a long line of code that does not fit into the width of a phone, so it has to scroll by itself")
```

> quoted
"""


def answered(text: str) -> str:
    """A stream of the server with this text, for views of what the demo model would not write."""
    chunks = [
        {"choices": [{"index": 0, "delta": {"content": text}, "finish_reason": "stop"}]},
        {
            "choices": [],
            "usage": {
                "prompt_tokens": 40,
                "completion_tokens": 90,
                "prompt_tokens_details": {"cached_tokens": 16},
            },
        },
    ]
    return "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks) + "data: [DONE]\n\n"


@pytest.mark.parametrize("viewport", VIEWS)
def test_views_are_accessible_and_fit(
    watched: WATCH, demo: Server, folder: Path, viewport: dict[str, int], axe: Any
) -> None:
    given = media.clip(folder)
    page = watched(viewport=viewport, reduced_motion="reduce").open(demo.url)

    def look(name: str) -> None:
        for scheme in ("light", "dark"):
            page.emulate_media(color_scheme=scheme)
            axe(page, name)

    look("empty")
    pick(page, given.path, "")
    page.wait_for_selector(".tray-item")
    look("with a file")
    ask(page, given.question)
    page.wait_for_selector(".frame canvas")
    page.route(
        "**/v1/chat/completions",
        lambda route: route.fulfill(content_type="text/event-stream", body=answered(MARKDOWN)),
    )
    ask(page, "Show me everything.", 2)
    page.locator(".timing summary").first.click()
    look("answers")
    for open_, name in (("Settings", "settings"), ("Show the request as code", "code")):
        page.locator("#top").get_by_label(open_).click()
        look(name)
        page.keyboard.press("Escape")
    if viewport["width"] < 800:
        page.get_by_label("Conversations and views").click()
        page.wait_for_selector(".sidebar-open")
        look("sidebar")
    page.get_by_role("link", name="Server").click()
    until(page, "document.querySelectorAll('.stages:not(.models) tbody tr').length === 4")
    look("server")
