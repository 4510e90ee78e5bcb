"""The SVG files of README.md and docs/: safe to show anywhere, and true."""

from __future__ import annotations

import base64
import io
import re
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
from PIL import Image

from sensorium import LLM

ROOT = Path(__file__).parents[1]
ASSETS = ROOT / "docs" / "assets"
SVG = "{http://www.w3.org/2000/svg}"
FILES = sorted(ASSETS.glob("*.svg"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_a_file_is_plain_svg(path: Path) -> None:
    """No script, and nothing that would be loaded from elsewhere."""
    root = ElementTree.parse(path).getroot()
    assert root.tag == f"{SVG}svg"
    assert root.find(f"{SVG}title") is not None
    known = {"svg", "title", "desc", "style", "rect", "path", "circle", "text", "g", "image"}
    for element in root.iter():
        assert element.tag.removeprefix(SVG) in known
        for name, value in element.attrib.items():
            assert not name.lower().startswith("on")
            if name.endswith("href"):
                assert value.startswith("data:image/png;base64,")
        if element.tag == f"{SVG}style":
            assert not re.search(r"url\(|@import", element.text or "")


def test_the_charts_show_the_newest_results() -> None:
    done = subprocess.run(
        [sys.executable, "benchmarks/chart.py", "--check"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert {"chat.svg", "peers.svg", "media-peers.svg"} <= {path.name for path in FILES}


def test_the_recorded_answers_are_those_of_the_model() -> None:
    """The conversation in the recording, held again with the images that it shows."""
    root = ElementTree.parse(ASSETS / "chat.svg").getroot()
    images = {
        group.findtext(f"{SVG}text"): group.find(f"{SVG}image") for group in root.iter(f"{SVG}g")
    }
    messages: list[dict[str, object]] = []
    attached: list[dict[str, object]] = []
    asked = 0
    lines = iter((root.findtext(f"{SVG}desc") or "").splitlines())
    with LLM(model="demo") as llm:
        for line in lines:
            named = re.search(r"(?:--|/)image (\S+)", line)
            if line.startswith("> /reset"):
                messages, attached = [], []
            elif named:
                image = images[named[1]]
                assert image is not None
                data = base64.b64decode(image.attrib["href"].partition(",")[2])
                pil = Image.open(io.BytesIO(data))
                attached.append({"type": "image_pil", "image_pil": pil})
            elif re.match(r"> [^/]", line):
                text = {"type": "text", "text": line.removeprefix("> ")}
                messages.append({"role": "user", "content": [*attached, text]})
                answer = next(lines)
                [output] = llm.chat(messages, use_tqdm=False)
                assert output.outputs[0].text == answer
                messages.append({"role": "assistant", "content": answer})
                attached, asked = [], asked + 1
    assert asked == 3
