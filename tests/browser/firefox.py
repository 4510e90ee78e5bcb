"""The playground in Firefox: ``python -m tests.browser.firefox``, not part of the test suite.

It needs Debian's firefox-esr, or ``SENSORIUM_FIREFOX``; with xvfb and xclip a picture is also pasted
from a real clipboard. With ``--screenshots FOLDER`` it keeps pictures.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import os
import shutil
import tempfile
from collections.abc import Awaitable, Callable
from pathlib import Path

from tests.browser import media
from tests.browser.bidi import Display, Firefox
from tests.e2e.serving import Server

PROGRAM = os.environ.get("SENSORIUM_FIREFOX") or shutil.which("firefox-esr") or "firefox"
FIELD = ".composer textarea"
PICKER = "input[type=file][aria-label='Files to attach']"
DROP = """([data, name, type]) => {
    const bytes = Uint8Array.from(atob(data), (char) => char.charCodeAt(0));
    const dataTransfer = new DataTransfer();
    dataTransfer.items.add(new File([bytes], name, { type }));
    for (const event of ["dragenter", "dragover", "drop"])
        document.querySelector(".chat").dispatchEvent(
            new DragEvent(event, { dataTransfer, bubbles: true, cancelable: true }));
}"""
PASTE = """([data, name, type]) => {
    const bytes = Uint8Array.from(atob(data), (char) => char.charCodeAt(0));
    const clipboardData = new DataTransfer();
    clipboardData.items.add(new File([bytes], name, { type }));
    const event = new ClipboardEvent("paste", { bubbles: true, cancelable: true });
    Object.defineProperty(event, "clipboardData", { value: clipboardData });
    document.querySelector(".composer textarea").dispatchEvent(event);
}"""
"""Firefox leaves the files out of an event that a script makes, and has no images to copy without a
window; ``clipboard`` pastes with one."""
ANSWERS = """(count) => document.querySelectorAll(".message-assistant:not(.is-running)").length === count
    && !document.querySelector(".is-running")"""
LAST = "() => [...document.querySelectorAll('.message-assistant')].at(-1).querySelector('.prose').innerText.trim()"


class Visit:
    """A conversation in the page."""

    def __init__(self, firefox: Firefox, pictures: Path | None, name: str) -> None:
        self.firefox = firefox
        self._pictures = pictures
        self._name = name
        self.num_answers = 0

    async def open(self, url: str) -> None:
        await self.firefox.open(url)
        await self.firefox.until("() => document.querySelector('#model b') !== null")

    async def ask(self, text: str) -> str:
        await self.firefox.click(FIELD)
        await self.firefox.type(text)
        await self.firefox.press("Enter")
        return await self.answer()

    async def answer(self) -> str:
        self.num_answers += 1
        await self.firefox.until(ANSWERS, self.num_answers)
        return str(await self.firefox.evaluate(LAST))

    async def begin(self) -> None:
        """Begin a conversation."""
        await self.firefox.press("Control", "Shift", "O")
        await self.firefox.until("() => document.querySelectorAll('.message').length === 0")
        self.num_answers = 0

    async def attach(self, how: str, given: media.Medium, kind: str) -> None:
        if how == "pick":
            await self.firefox.pick(PICKER, given.path)
        else:
            data = base64.b64encode(given.path.read_bytes()).decode()
            await self.firefox.evaluate(
                DROP if how == "drop" else PASTE, [data, given.path.name, kind]
            )
        await self.firefox.until("() => document.querySelector('.tray-item') !== null")

    async def show(self, name: str) -> None:
        wide = await self.firefox.evaluate(
            "() => document.documentElement.scrollWidth - document.documentElement.clientWidth"
        )
        assert wide <= 0, f"{name}: {wide} pixels too wide"
        if self._pictures is not None:
            await self.firefox.screenshot(self._pictures / f"firefox-{self._name}-{name}.png")

    async def click_button(self, label: str) -> None:
        """Click the button with this label or text."""
        await self.firefox.evaluate(
            """(label) => {
                document.querySelectorAll("[data-wanted]").forEach((one) => one.removeAttribute("data-wanted"));
                [...document.querySelectorAll("button, a")].filter((one) =>
                    (one.getAttribute("aria-label") ?? one.textContent.trim()) === label)
                    .forEach((one) => one.setAttribute("data-wanted", ""));
            }""",
            label,
        )
        await self.firefox.click("[data-wanted]")


async def pictures_clips_documents(visit: Visit, folder: Path) -> None:
    """Each way of attaching, each kind of file, right answers."""
    assert "demo model" in await visit.ask("Who are you?")
    figures = await visit.firefox.evaluate("() => document.querySelector('.figures').innerText")
    assert "tokens/s" in figures
    given = media.picture(folder)
    for how in ("drop", "paste", "pick"):
        await visit.begin()
        await visit.attach(how, given, "image/png")
        assert await visit.ask(given.question) == given.answer, how
    await visit.begin()
    clip = media.clip(folder)
    await visit.attach("pick", clip, "")
    assert await visit.ask(clip.question) == clip.answer
    await visit.firefox.until("() => document.querySelectorAll('.frame canvas').length >= 4")
    await visit.show("clip")
    await visit.begin()
    paper = media.document(folder)
    await visit.attach("drop", paper, "application/pdf")
    assert await visit.ask(paper.question) == paper.answer
    await visit.show("answers")


async def stop(visit: Visit) -> None:
    """An endless answer ends at Escape; the part of it stays."""
    await visit.firefox.evaluate(
        "() => localStorage.setItem('sensorium.settings', JSON.stringify({sampling: {max_tokens: 1900, temperature: 2}}))"
    )
    await visit.firefox.reload()
    await visit.firefox.until("() => document.querySelector('#model b') !== null")
    await visit.firefox.evaluate(
        """() => {
            const fetch = window.fetch;
            window.fetch = (url, options) => fetch(url, typeof options?.body === "string"
                ? { ...options, body: JSON.stringify({ ...JSON.parse(options.body), ignore_eos: true }) } : options);
        }"""
    )
    await visit.firefox.click(FIELD)
    await visit.firefox.type("Who are you?")
    await visit.firefox.press("Enter")
    await visit.firefox.until(
        "() => document.querySelector('.is-running .prose')?.textContent.length > 20"
    )
    await visit.firefox.press("Escape")
    visit.num_answers = 0
    assert len(await visit.answer()) > 20
    text = await visit.firefox.evaluate(
        "() => document.querySelector('.message-assistant').innerText"
    )
    assert "Stopped." in text
    await visit.firefox.evaluate("() => localStorage.removeItem('sensorium.settings')")


async def reload(visit: Visit, url: str, folder: Path) -> None:
    """A conversation is there again, with its picture."""
    await visit.open(url)
    await visit.begin()
    given = media.picture(folder)
    await visit.attach("pick", given, "")
    assert await visit.ask(given.question) == given.answer
    await visit.firefox.reload()
    await visit.firefox.until("() => document.querySelector('.conversation') !== null")
    await visit.firefox.evaluate("() => document.querySelector('.conversation').click()")
    visit.num_answers = 0
    assert await visit.answer() == given.answer
    await visit.firefox.until("() => document.querySelector('.attachment img')?.naturalWidth > 0")


async def camera(visit: Visit) -> None:
    """A photo, and a clip that the model looks at."""
    await visit.begin()
    await visit.click_button("Use the camera")
    await visit.firefox.until("() => document.querySelector('.camera')?.videoWidth > 0")
    await visit.click_button("Take a photo")
    await visit.firefox.until("() => document.querySelectorAll('.tray-item').length === 1")
    await visit.click_button("Use the camera")
    await visit.firefox.until("() => document.querySelector('.camera')?.videoWidth > 0")
    await visit.click_button("Record a clip")
    await visit.firefox.until(
        "() => /0:0[1-9]/.test(document.querySelector('.record-time')?.textContent)"
    )
    await visit.click_button("Stop")
    await visit.firefox.until("() => document.querySelectorAll('.tray-item').length === 2")
    assert await visit.ask("What moves?")
    await visit.firefox.until("() => document.querySelectorAll('.frame canvas').length >= 2")
    await visit.show("recorded")


async def server_and_settings(visit: Visit) -> None:
    """The other views."""
    await visit.firefox.press("Control", ",")
    await visit.firefox.until("() => document.querySelector('dialog[open]') !== null")
    await visit.show("settings")
    await visit.firefox.press("Escape")
    await visit.firefox.evaluate("() => { location.hash = '#/server'; }")
    await visit.firefox.evaluate(
        "() => [...document.querySelectorAll('a')].find((one) => one.textContent.trim() === 'Server')?.click()"
    )
    await visit.firefox.until(
        "() => document.querySelectorAll('.stages:not(.models) tbody tr').length === 4"
    )
    await visit.show("server")


async def clipboard(url: str, folder: Path, profile: Path) -> None:
    """A picture that another program has copied is pasted with Control+V, and answered."""
    async with Display() as display, Firefox(PROGRAM, profile, display.name) as firefox:
        visit = Visit(firefox, None, "clipboard")
        await visit.open(url)
        given = media.picture(folder)
        await display.copy(given.path, "image/png")
        await firefox.click(FIELD)
        await firefox.press("Control", "v")
        await firefox.until("() => document.querySelector('.tray-item') !== null")
        assert await visit.ask(given.question) == given.answer
        await visit.begin()
        words = folder / "words.txt"
        words.write_text("Who are you?")
        await display.copy(words, "UTF8_STRING")
        await firefox.click(FIELD)
        await firefox.press("Control", "v")
        await firefox.until(f"() => document.querySelector('{FIELD}').value === 'Who are you?'")
    print("a window: a picture and words of the clipboard are pasted", flush=True)


async def hears(visit: Visit, folder: Path) -> None:
    """A sound is answered, one is recorded."""
    given = media.sound(folder)
    await visit.attach("pick", given, "")
    assert await visit.ask(given.question) == given.answer
    await visit.click_button("Record a sound")
    await visit.firefox.until(
        "() => document.querySelector('.record-time')?.textContent !== '0:00'"
    )
    await visit.click_button("Stop and use it")
    await visit.firefox.until("() => document.querySelector('.tray-item') !== null")
    await visit.show("sound")


async def check(demo: str, demo_audio: str, pictures: Path | None) -> None:
    """All of it, in four kinds of windows."""
    for scheme, number in (("dark", 0), ("light", 1)):
        for name, size in (("phone", (390, 844)), ("desktop", (1280, 800))):
            with tempfile.TemporaryDirectory() as profile, tempfile.TemporaryDirectory() as made:
                folder = Path(made)
                preference = {"layout.css.prefers-color-scheme.content-override": number}
                async with Firefox(PROGRAM, Path(profile), **preference) as firefox:
                    await firefox.resize(*size)
                    visit = Visit(firefox, pictures, f"{name}-{scheme}")
                    await visit.open(demo)
                    whole = (name, scheme) == ("desktop", "light")
                    steps: list[Callable[[], Awaitable[None]]] = [
                        lambda v=visit, f=folder: pictures_clips_documents(v, f),
                        lambda v=visit: server_and_settings(v),
                    ]
                    if whole:
                        steps += [
                            lambda v=visit, f=folder: reload(v, demo, f),
                            lambda v=visit: camera(v),
                            lambda v=visit: stop(v),
                        ]
                    for step in steps:
                        await step()
                    if whole:
                        visit.num_answers = 0
                        await visit.open(demo_audio)
                        await hears(visit, folder)
                    foreign = [
                        u
                        for u in firefox.requests
                        if not u.startswith(
                            ("http://127.0.0.1:", "blob:", "data:", "about:", "moz-")
                        )
                    ]
                    assert foreign == [], foreign
                    print(f"{name}, {scheme}: right; complaints: {firefox.complaints}", flush=True)


def main() -> None:
    """Start the servers and check."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--screenshots", type=Path, metavar="FOLDER")
    pictures = parser.parse_args().screenshots
    with tempfile.TemporaryDirectory() as logs:
        servers = [Server(model, Path(logs) / model) for model in ("demo", "demo-audio")]
        try:
            if all(map(shutil.which, ("Xvfb", "xclip"))):
                with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as own:
                    asyncio.run(clipboard(servers[0].url, Path(folder), Path(own)))
            else:
                print("no picture of a clipboard is pasted: that needs xvfb and xclip", flush=True)
            asyncio.run(check(servers[0].url, servers[1].url, pictures))
        finally:
            for server in servers:
                server.stop()


if __name__ == "__main__":
    main()
