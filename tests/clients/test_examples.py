"""The programs below ``examples/clients`` run as they are, each in its client's own environment.

``python -m tests.clients.environments`` installs those; without them only the clients run that are
among our own tests' packages, and curl.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.clients.environments import CACHE, EXAMPLES, is_installed, python_of
from tests.e2e.serving import Server

ROOT = EXAMPLES.parents[1]
ANSWER = "green triangle"
PROGRAMS: dict[str, tuple[str, int, tuple[str, ...]]] = {
    "responses.py": ("", 1, ("form: kind=", "call: weather", "then: ")),
    "anthropic_messages.py": ("", 1, ("tokens: ", "call: weather", "then: ")),
    "curl.sh": ("", 3, ()),
    "agents_sdk.py": ("agents", 1, ("called: 1 answered: True",)),
    "pydantic_ai_agent.py": ("pydantic_ai", 1, ("form: kind=",)),
    "instructor_form.py": ("instructor", 0, ("form: kind=",)),
    "langchain_chat.py": ("langchain", 2, ("form: kind=",)),
    "llamaindex_chat.py": ("llamaindex", 1, ("form: kind=",)),
    "litellm_chat.py": ("litellm", 2, ()),
    "node/openai.mjs": ("node", 2, ()),
    "node/ai_sdk.mjs": ("node", 1, ("form: {", "steps: 2 called: 1")),
}
"""By program: its environment ("" for ours), how often it asks what is in the picture, and what
else it prints."""


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A picture of a star and a triangle."""
    folder = tmp_path_factory.mktemp("media")
    draw = [sys.executable, "scripts/demo_media.py", "--seed", "7", "--folder", folder]
    subprocess.run(draw, cwd=ROOT, check=True, capture_output=True)
    return folder / "shapes.png"


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a server of the demo model."""
    log = tmp_path_factory.mktemp("clients") / "server.log"
    server = Server("demo", log, ("--max-num-seqs", "4", "--num-kv-blocks", "256"))
    yield server.url
    assert server.stop() == 0


def command_of(program: str) -> list[str]:
    """The beginning of the command that runs a program; skips the test where it cannot run."""
    name = PROGRAMS[program][0]
    path = str(EXAMPLES / program)
    if name and not is_installed(name):
        pytest.skip(f"not installed: python -m tests.clients.environments {name}")
    if program.endswith(".mjs"):
        # Modules are looked for beside the program.
        return ["node", str(CACHE / name / Path(program).name)]
    if program.endswith(".sh"):
        if shutil.which("curl") is None:
            pytest.skip("there is no curl on this machine")
        return ["sh", path]
    return [str(python_of(name)) if name else sys.executable, path]


@pytest.mark.slow
@pytest.mark.parametrize("program", PROGRAMS)
def test_the_program_runs(program: str, url: str, picture: Path) -> None:
    command = [*command_of(program), str(picture), url]
    if program.endswith(".mjs"):
        shutil.copy(EXAMPLES / program, command[1])
    environment = {**os.environ, "OPENAI_API_KEY": "none", "LITELLM_LOG": "ERROR"}
    environment |= {"LITELLM_LOCAL_MODEL_COST_MAP": "True"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 0, done.stderr + done.stdout
    _, number, printed = PROGRAMS[program]
    assert done.stdout.lower().count(ANSWER) >= number, done.stdout
    for text in printed:
        assert text in done.stdout, done.stdout
