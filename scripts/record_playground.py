#!/usr/bin/env python3
"""Take the pictures of the playground that README.md shows, of the demo model's own answers.

Needs the extra ``test`` and Debian's chromium.

    .venv/bin/python scripts/record_playground.py [--folder docs/assets]
"""

from __future__ import annotations

import argparse
import base64
import io
import itertools
import sys
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
from PIL import Image
from playwright.sync_api import sync_playwright

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tests.browser import media  # noqa: E402
from tests.browser.conftest import CHROMIUM, FLAGS  # noqa: E402
from tests.browser.waiting import until  # noqa: E402
from tests.e2e.serving import Server  # noqa: E402
from training.pictures import draw_picture  # noqa: E402

SIZE = {"width": 1200, "height": 760}
SCALE = 1.5
NUM_CLIENTS = 6
LONG_CLIP = 0
"""Seed of a clip with many frames."""
NUM_SCRAPES = 44
"""Points of the charts in the picture of the server."""


def main() -> int:
    """Serve the demo, hold a conversation, load the server, take both pictures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=ROOT / "docs" / "assets")
    folder = parser.parse_args().folder
    with tempfile.TemporaryDirectory() as name, sync_playwright() as playwright:
        server = Server("demo", Path(name) / "server.log")
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=list(FLAGS))
        try:
            save(chat(browser, server.url, Path(name)), folder / "playground-chat.png")
            save(watch(browser, server.url), folder / "playground-server.png")
        finally:
            browser.close()
            server.stop()
    return 0


def opened(browser: Any, url: str, scheme: str) -> Any:
    """The page of a server."""
    page = browser.new_page(viewport=SIZE, device_scale_factor=SCALE, color_scheme=scheme)
    page.goto(url)
    page.wait_for_selector("#model b")
    return page


def chat(browser: Any, url: str, folder: Path) -> bytes:
    """Ask about a clip twice, so that the kernels are compiled when the picture is taken."""
    page = opened(browser, url, "light")
    given = media.clip(folder, LONG_CLIP)
    for number, question in enumerate(("Who are you?", given.question)):
        if number:
            page.locator("input[multiple]").set_input_files(given.path)
            page.wait_for_selector(".tray-item")
        page.fill(".composer textarea", question)
        page.keyboard.press("Enter")
        until(
            page,
            "n => document.querySelectorAll('.message-assistant:not(.is-running)').length === n",
            number + 1,
        )
    page.wait_for_selector(".frame:last-child canvas")
    page.evaluate("document.activeElement.blur()")
    page.mouse.move(5, 400)
    page.wait_for_timeout(500)
    page.locator(".scroller").evaluate("element => element.scrollTo(0, element.scrollHeight)")
    page.wait_for_timeout(500)
    return bytes(page.screenshot())


def watch(browser: Any, url: str) -> bytes:
    """Watch the server while clients ask it, some about pictures."""
    ended = threading.Event()
    seeds = itertools.count()

    def ask(number: int) -> None:
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none")
        while not ended.is_set():
            content = [{"type": "text", "text": f"How many circles are there? {number}"}]
            if number % 2:
                picture = io.BytesIO()
                draw_picture(next(seeds), "shapes").image.save(picture, "PNG")
                data = base64.b64encode(picture.getvalue()).decode()
                image = f"data:image/png;base64,{data}"
                content.insert(0, {"type": "image_url", "image_url": {"url": image}})
            messages = [{"role": "user", "content": content}]
            client.chat.completions.create(
                model="demo",
                messages=messages,  # type: ignore[arg-type]
                max_tokens=40 + 60 * number,
                extra_body={"ignore_eos": True},
            )
            number = (number * 5 + 1) % 7

    with ThreadPoolExecutor(NUM_CLIENTS) as pool:
        for number in range(NUM_CLIENTS):
            pool.submit(ask, number)
        try:
            page = opened(browser, f"{url}/#server", "dark")
            page.wait_for_timeout(2000 * NUM_SCRAPES)
            return bytes(page.screenshot())
        finally:
            ended.set()


def save(data: bytes, path: Path) -> None:
    """Keep a picture with a palette: a third of the size, and no difference to see."""
    image = Image.open(io.BytesIO(data)).convert("RGB")
    image.quantize(192, Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE).save(
        path, optimize=True
    )
    print(f"{path}: {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    sys.exit(main())
