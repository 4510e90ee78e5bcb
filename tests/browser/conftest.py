"""One browser for all tests of this folder, and a server for each demo model, started when it is needed."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.browser.waiting import SECONDS, until
from tests.e2e.serving import Server

CHROMIUM = os.environ.get("SENSORIUM_CHROMIUM") or shutil.which("chromium") or ""
FLAGS = (
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update"),
    *("--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"),
)


# Playwright keeps an event loop running in this thread, in which no asynchronous test of another
# module could run: it ends with the module.
@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Debian's Chromium without a window; no test runs where there is none."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if not CHROMIUM:
        pytest.skip("there is no chromium: install Debian's package, or set SENSORIUM_CHROMIUM")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=list(FLAGS))
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def serve(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Server]]:
    """A function that returns the server of a model with some flags, started at the first call."""
    servers: dict[tuple[str | None, ...], Server] = {}

    def get(model: str | None, *flags: str) -> Server:
        if (model, *flags) not in servers:
            log = tmp_path_factory.mktemp("log") / "server.log"
            servers[model, *flags] = Server(model, log, flags)
        return servers[model, *flags]

    yield get
    for server in servers.values():
        server.stop()


@pytest.fixture(scope="session")
def demo(serve: Callable[..., Server]) -> Server:
    """The demo model's server."""
    return serve("demo")


@pytest.fixture(scope="session")
def several(serve: Callable[..., Server], tmp_path_factory: pytest.TempPathFactory) -> Server:
    """A server of a model that hears, and of one that embeds, which is started on demand."""
    models = [
        {"model": "demo-audio", "served-model-name": "listener"},
        {
            "model": "demo",
            "runner": "pooling",
            "served-model-name": "vectors",
            "on-demand": True,
        },
    ]
    path = tmp_path_factory.mktemp("several") / "serve.yaml"
    path.write_text(json.dumps({"models": models}))  # JSON is YAML
    return serve(None, "--config", str(path))


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the files are that are attached."""
    return tmp_path_factory.mktemp("media")


class Watched:
    """A browser context whose requests and complaints are written down."""

    def __init__(self, context: Any) -> None:
        self.context = context
        self.requests: list[str] = []
        self.complaints: list[str] = []
        context.set_default_timeout(SECONDS * 1000)
        context.on("request", lambda request: self.requests.append(request.url))
        context.on("weberror", lambda error: self.complaints.append(str(error.error)))
        context.on("console", self._on_console)

    def _on_console(self, message: Any) -> None:
        if message.type in ("error", "warning"):
            self.complaints.append(message.text)

    def open(self, url: str) -> Any:
        """A new page at an address."""
        page = self.context.new_page()
        page.goto(url)
        page.wait_for_selector("#model :is(b, select)")
        return page

    def check(self) -> None:
        """Nothing was asked for elsewhere, and the browser had nothing to complain about."""
        foreign = [
            u for u in self.requests if not u.startswith(("http://127.0.0.1:", "blob:", "data:"))
        ]
        assert foreign == []
        assert self.complaints == []


@pytest.fixture
def watched(browser: Any) -> Iterator[Callable[..., Watched]]:
    """A function that makes a context; at the end it must have been quiet."""
    made: list[Watched] = []

    def make(**options: Any) -> Watched:
        options.setdefault("viewport", {"width": 1280, "height": 800})
        made.append(Watched(browser.new_context(**options)))
        return made[-1]

    yield make
    for one in made:
        one.context.close()
    for one in made:
        one.check()


@pytest.fixture(scope="session")
def axe() -> Callable[[Any, str], None]:
    """A function that finds no fault in a page: axe-core has none, and nothing is wider than the window.

    With SENSORIUM_SCREENSHOTS it keeps a picture of each page in that folder.
    """
    library = pytest.importorskip(
        "axe_playwright_python", reason="axe-playwright-python is not installed"
    )
    [script] = Path(library.__file__).parent.rglob("axe.min.js")
    source = script.read_text()

    def check(page: Any, name: str) -> None:
        until(page, "!document.getAnimations().some((one) => one.playState === 'running')")
        pictures = os.environ.get("SENSORIUM_SCREENSHOTS")
        if pictures:
            size, scheme = (
                page.viewport_size,
                page.evaluate("matchMedia('(prefers-color-scheme: dark)').matches"),
            )
            page.screenshot(
                path=f"{pictures}/{size['width']}-{'dark' if scheme else 'light'}-{name.replace(' ', '-')}.png"
            )
        page.evaluate(source)
        found = page.evaluate("axe.run(document, {resultTypes: ['violations']})")
        faults = [
            f"{fault['id']}: {fault['help']} at {[node['target'] for node in fault['nodes'][:3]]} {fault['nodes'][0].get('failureSummary', '')}"
            for fault in found["violations"]
        ]
        assert faults == [], name
        wide = page.evaluate(
            "document.documentElement.scrollWidth - document.documentElement.clientWidth"
        )
        assert wide <= 0, f"{name}: {wide} pixels too wide"

    return check
