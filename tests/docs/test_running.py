"""The pages' Python blocks run from top to bottom, and their requests are sent to the servers
that the pages start.

Models are loaded by the names in the text: below the folder in which the blocks run, each has a
tiny checkpoint of its architecture. ``demo-media`` is what ``scripts/demo`` draws.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.checkpoints import make_embedder, make_llava, make_qwen2_5_vl, make_ultravox
from tests.checkpoints.adapters import make_adapter
from tests.docs import running
from tests.docs.pages import PAGES, ROOT, blocks_of
from tests.docs.running import Page, Servers

CHECKPOINTS: dict[str, Callable[[Path], object]] = {
    "Qwen/Qwen2.5-VL-3B-Instruct": make_qwen2_5_vl,
    "Qwen/Qwen3-Embedding-0.6B": partial(make_embedder, "qwen3"),
    "fixie-ai/ultravox-v0_5-llama-3_2-1b": make_ultravox,
    "llava-hf/llava-1.5-7b-hf": make_llava,
}
"""Checkpoints that blocks load."""
PLAIN = "sensorium serve demo\n"
"""The command of many pages, which run one after the other with one server."""
WITH_CODE = [
    name
    for name in PAGES
    if name.startswith("docs/") and any(block.language == "python" for block in blocks_of(name))
]
"""Pages to run; the README's answers are compared, too, in ``tests/test_readme.py``."""
WITH_CODE.sort(key=lambda name: not any(PLAIN in block.code for block in blocks_of(name)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that looks like the root of the repository after ``scripts/demo``, with models in
    it.
    """
    made = tmp_path_factory.mktemp("docs")
    for name, build in CHECKPOINTS.items():
        build(made / name)
    make_adapter(made / "adapters" / "brief", made / "Qwen/Qwen2.5-VL-3B-Instruct")
    (made / "examples").symlink_to(ROOT / "examples")
    draw = [sys.executable, "scripts/demo_media.py", "--seed", "7", "--folder", made / "demo-media"]
    subprocess.run(draw, cwd=ROOT, check=True, capture_output=True)
    return made


@pytest.fixture(scope="module")
def servers(folder: Path) -> Iterator[Servers]:
    made = Servers(folder)
    yield made
    made.stop()


@pytest.fixture
def page(folder: Path, servers: Servers, monkeypatch: pytest.MonkeyPatch) -> Iterator[Page]:
    monkeypatch.chdir(folder)
    made = Page(servers)
    yield made
    made.close()


@pytest.mark.slow
@pytest.mark.parametrize("name", WITH_CODE)
def test_blocks_run(page: Page, name: str) -> None:
    try:
        for block in blocks_of(name):
            page.run(block)
    except BaseException:
        page.servers.drop()
        raise
    assert page.num_run


class Stub:
    """A server that ends when it is told to, or before."""

    def __init__(self, model: str, log: Path, flags: list[str]) -> None:
        self.log = log
        self.log.write_text(f"the log of {model}")
        self.process = self
        self.status: int | None = None

    def poll(self) -> int | None:
        return self.status

    def stop(self) -> int:
        self.status = 0 if self.status is None else self.status
        return self.status


def test_a_server_that_has_ended_is_not_taken_for_one_that_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(running, "Server", Stub)
    servers = Servers(tmp_path)
    servers.start(["demo"])
    first: Any = servers.running
    servers.start(["demo"])
    assert servers.running is first
    first.status = 139
    with pytest.raises(AssertionError, match="the log of demo"):
        servers.start(["demo"])
    assert servers.running is None
    servers.start(["demo"])
    assert servers.running is not first
    servers.drop()
    assert servers.running is None
