"""Firefox, without a window or on a display of its own, driven over WebDriver BiDi."""

from __future__ import annotations

import asyncio
import base64
import itertools
import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import aiohttp

SECONDS = 120
PREFERENCES: Mapping[str, Any] = {
    "browser.shell.checkDefaultBrowser": False,
    "datareporting.policy.dataSubmissionEnabled": False,
    "app.update.enabled": False,
    "network.captive-portal-service.enabled": False,
    "network.connectivity-service.enabled": False,
    "media.navigator.permission.disabled": True,
    "media.navigator.streams.fake": True,
    "media.autoplay.default": 0,
}
_LISTENING = re.compile(r"WebDriver BiDi listening on (ws://\S+)")
_KEYS = {
    "Enter": "\ue007",
    "Escape": "\ue00c",
    "Tab": "\ue004",
    "Control": "\ue009",
    "Shift": "\ue008",
    "ArrowUp": "\ue013",
}


class Firefox:
    """A browser with one page; with a window where it is given a ``display``.

    ``complaints``: what its console said of errors.
    """

    def __init__(
        self, program: str, profile: Path, display: str | None = None, **preferences: Any
    ) -> None:
        self._program = program
        self._profile = profile
        self._display = display
        self._preferences = {**PREFERENCES, **preferences}
        self._ids = itertools.count(1)
        self._answers: dict[int, asyncio.Future[Any]] = {}
        self.complaints: list[str] = []
        self.requests: list[str] = []
        self._page = ""

    async def __aenter__(self) -> Firefox:
        lines = (
            f"user_pref({json.dumps(k)}, {json.dumps(v)});" for k, v in self._preferences.items()
        )
        (self._profile / "user.js").write_text("\n".join(lines))
        self._process = await asyncio.create_subprocess_exec(
            *(self._program, *(() if self._display else ("--headless",)), "--no-remote"),
            *("--profile", str(self._profile), "--remote-debugging-port", "0"),
            env={**os.environ, **({"DISPLAY": self._display} if self._display else {})},
            stderr=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.DEVNULL,
        )
        assert self._process.stderr is not None
        async with asyncio.timeout(SECONDS):
            while True:
                line = (await self._process.stderr.readline()).decode()
                assert line, "Firefox has ended"
                if found := _LISTENING.search(line):
                    break
        self._drain = asyncio.create_task(self._process.stderr.read())
        self._http = aiohttp.ClientSession()
        self._socket = await self._http.ws_connect(f"{found[1]}/session", max_msg_size=1 << 28)
        self._reader = asyncio.create_task(self._read())
        await self.command("session.new", capabilities={})
        events = ["log.entryAdded", "network.beforeRequestSent"]
        await self.command("session.subscribe", events=events)
        made = await self.command("browsingContext.create", type="tab")
        self._page = made["context"]
        return self

    async def __aexit__(self, *error: object) -> None:
        self._reader.cancel()
        await self._http.close()
        self._process.terminate()
        await self._process.wait()
        self._drain.cancel()

    async def _read(self) -> None:
        async for message in self._socket:
            found = json.loads(message.data)
            if found["type"] == "event":
                self._note(found["method"], found["params"])
            else:
                self._answers.pop(found["id"]).set_result(found)

    def _note(self, method: str, event: Mapping[str, Any]) -> None:
        if method == "network.beforeRequestSent":
            self.requests.append(event["request"]["url"])
        elif event["level"] in ("error", "warn"):
            self.complaints.append(str(event["text"]))

    async def command(self, method: str, **params: Any) -> Any:
        """Send a command; return its result."""
        number = next(self._ids)
        answer = self._answers[number] = asyncio.get_running_loop().create_future()
        await self._socket.send_json({"id": number, "method": method, "params": params})
        found = await asyncio.wait_for(answer, SECONDS)
        assert found["type"] == "success", (method, found)
        return found["result"]

    async def open(self, url: str) -> None:
        """Go to an address."""
        await self.command("browsingContext.navigate", context=self._page, url=url, wait="complete")

    async def reload(self) -> None:
        """Load the page again."""
        await self.command("browsingContext.reload", context=self._page, wait="complete")

    async def resize(self, width: int, height: int) -> None:
        """Set the size of the window."""
        viewport = {"width": width, "height": height}
        await self.command("browsingContext.setViewport", context=self._page, viewport=viewport)

    async def evaluate(self, function: str, *arguments: Any) -> Any:
        """Return what a JavaScript function returns, or what its promise gives."""
        text = (
            f"(async () => JSON.stringify(await ({function})"
            f"(...{json.dumps(arguments)})) ?? 'null')()"
        )
        done = await self.command(
            "script.evaluate",
            expression=text,
            target={"context": self._page},
            awaitPromise=True,
            userActivation=True,
        )
        assert done["type"] == "success", done
        return json.loads(done["result"]["value"])

    async def until(self, function: str, *arguments: Any) -> None:
        """Return when a JavaScript function is true."""
        async with asyncio.timeout(SECONDS):
            while not await self.evaluate(function, *arguments):
                await asyncio.sleep(0.05)

    async def click(self, selector: str) -> None:
        """Click at the middle of the last visible element with this selector."""
        x, y = await self.evaluate(
            """(selector) => {
                const seen = [...document.querySelectorAll(selector)].filter((one) => one.getClientRects().length);
                const one = seen.at(-1);
                if (!one) throw new Error(`there is no ${selector}`);
                one.scrollIntoView({ block: "nearest" });
                const box = one.getBoundingClientRect();
                return [box.x + box.width / 2, box.y + box.height / 2].map(Math.round);
            }""",
            selector,
        )
        steps = [
            {"type": "pointerMove", "x": x, "y": y},
            {"type": "pointerDown", "button": 0},
            {"type": "pointerUp", "button": 0},
        ]
        mouse = {"type": "pointer", "id": "mouse", "actions": steps}
        await self.command("input.performActions", context=self._page, actions=[mouse])

    async def type(self, text: str) -> None:
        """Press the keys of a text."""
        await self._press([(key, direction) for key in text for direction in ("keyDown", "keyUp")])

    async def press(self, *keys: str) -> None:
        """Press keys together, such as ``Control`` and ``,``."""
        named = [_KEYS.get(key, key) for key in keys]
        down = [(key, "keyDown") for key in named]
        await self._press([*down, *((key, "keyUp") for key in reversed(named))])

    async def _press(self, steps: Sequence[tuple[str, str]]) -> None:
        actions = [{"type": direction, "value": key} for key, direction in steps]
        keyboard = {"type": "key", "id": "keyboard", "actions": actions}
        await self.command("input.performActions", context=self._page, actions=[keyboard])

    async def pick(self, selector: str, path: Path) -> None:
        """Give a file to an input, as its dialog would."""
        found = await self.command(
            "script.evaluate",
            expression=f"document.querySelector({json.dumps(selector)})",
            target={"context": self._page},
            awaitPromise=False,
        )
        element = {"sharedId": found["result"]["sharedId"]}
        await self.command("input.setFiles", context=self._page, element=element, files=[str(path)])

    async def screenshot(self, path: Path) -> None:
        """Keep a picture of the window."""
        found = await self.command("browsingContext.captureScreenshot", context=self._page)
        path.write_bytes(base64.b64decode(found["data"]))


class Display:
    """An X display without a screen, and its clipboard: Debian's xvfb and xclip."""

    def __init__(self) -> None:
        self.name = ""

    async def __aenter__(self) -> Display:
        reader, writer = os.pipe()
        self._process = await asyncio.create_subprocess_exec(
            *("Xvfb", "-displayfd", str(writer), "-screen", "0", "1280x900x24"),
            *("-nolisten", "tcp"),
            pass_fds=(writer,),
            stderr=asyncio.subprocess.DEVNULL,
        )
        os.close(writer)
        with open(reader) as told:
            number = (await asyncio.to_thread(told.readline)).strip()
        assert number, "Xvfb has ended"
        self.name = f":{number}"
        return self

    async def __aexit__(self, *error: object) -> None:
        self._process.terminate()
        await self._process.wait()

    async def copy(self, path: Path, kind: str) -> None:
        """Put the content of a file on the clipboard, as a program that shows it would."""
        xclip = await asyncio.create_subprocess_exec(
            *("xclip", "-selection", "clipboard", "-t", kind, "-i", str(path)),
            env={**os.environ, "DISPLAY": self.name},
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.DEVNULL,
        )
        assert await xclip.wait() == 0  # a child of it serves the clipboard until the display ends
