from __future__ import annotations

import argparse
import asyncio
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from sensorium import environment
from sensorium.cli.commands.bench import add_parser
from sensorium.errors import ConfigError
from sensorium.processes.start import child_environment
from tests.bench.fake_server import serving


def parse(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_parser(parser.add_subparsers())
    return parser.parse_args(["bench", *arguments])


def test_defaults_of_serve() -> None:
    found = parse("serve")
    assert found.base_url == "http://127.0.0.1:8000"
    assert math.isinf(found.request_rate)
    assert found.concurrency is None
    assert (found.images, found.image_size) == (0, (640, 480))


@pytest.mark.parametrize("kind", ["throughput", "latency", "startup"])
def test_offline_kinds_take_engine_flags(kind: str) -> None:
    found = parse(kind, "--model", "some/model", "--max-model-len", "512", "--num-threads", "2")
    assert found.handler is not None


@pytest.mark.parametrize("size", ["640", "ax4", "-1x4", "640x480x3", ""])
def test_wrong_image_sizes(size: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse("serve", f"--image-size={size}")
    assert "WIDTHxHEIGHT" in capsys.readouterr().err


def test_a_kind_must_be_named() -> None:
    with pytest.raises(SystemExit):
        parse()


async def test_serve_measures_and_writes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "serve.json"
    async with serving() as fake:
        arguments = parse(
            *("serve", "--base-url", fake.base_url, "--num-prompts", "6", "--output-len", "5"),
            *("--images", "1", "--image-size", "32x24", "--concurrency", "2", "--seed", "7"),
            *("--ignore-eos", "--extra-body", '{"top_k": 1}', "--api-key", "secret-key"),
            *("--save-requests", "--output", str(file)),
        )
        assert await asyncio.to_thread(arguments.handler, arguments) == 0
        assert len(fake.bodies) == 7, "one warm-up"
        assert fake.bodies[0]["messages"] not in [body["messages"] for body in fake.bodies[1:]]
        assert all(body["ignore_eos"] and body["top_k"] == 1 for body in fake.bodies)
        assert set(fake.authorizations) == {"Bearer secret-key"}
    text = file.read_text()
    found = json.loads(text)
    assert (found["benchmark"], found["settings"]["model"]) == ("serve", "fake-model")
    assert (found["num_completed"], found["completion_tokens"]) == (6, 30)
    assert len(found["requests"]) == 6
    assert "secret-key" not in text
    assert "6 of 6 requests completed" in capsys.readouterr().out


async def test_serve_fails_when_nothing_completes() -> None:
    async with serving() as fake:
        arguments = parse(
            *("serve", "--base-url", fake.base_url, "--num-prompts", "2"),
            *("--extra-body", '{"fake": "refuse"}'),
        )
        assert await asyncio.to_thread(arguments.handler, arguments) == 1


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--extra-body", "{"), "not valid JSON"),
        (("--extra-body", "[1]"), "must be a JSON object"),
        (("--base-url", "http://127.0.0.1:9"), "lists no model"),
        (("--num-prompts", "0"), "num_prompts must be at least 1"),
    ],
)
def test_wrong_flags_of_serve(flags: tuple[str, ...], message: str) -> None:
    arguments = parse("serve", *flags)
    with pytest.raises(ConfigError, match=message):
        arguments.handler(arguments)


def test_parsing_is_light() -> None:
    code = (
        "import argparse, sys; from sensorium.cli.commands.bench import add_parser; "
        "add_parser(argparse.ArgumentParser().add_subparsers()); "
        "print([m for m in ('torch', 'numpy', 'aiohttp', 'PIL', 'numba') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    "wrong",
    [
        *("--rows=0", "--rows=-1", "--rows=many", "--rows=70000", "--rows=1.5"),
        *("--shape=0x8", "--shape=8", "--shape=99999x99999", "--threads=0", "--threads=two"),
        *("--seconds=-1", "--seconds=nan", "--seconds=inf", "--seconds=long", "--formats=int5"),
    ],
)
def test_wrong_values_of_kernels(wrong: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        parse("kernels", wrong)
    assert stopped.value.code == 2
    message = capsys.readouterr().err
    assert wrong.partition("=")[0] in message
    assert wrong.partition("=")[2] in message


def bench_kernels(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run ``bench kernels`` in a process of its own, as it sets the number of threads.

    The kernels are those that this machine has compiled, if it has.
    """
    (folder / "sensorium").mkdir(exist_ok=True)
    kernels = environment.cache_root() / "sensorium" / "kernels"
    kernels.mkdir(parents=True, exist_ok=True)
    (folder / "sensorium" / "kernels").symlink_to(kernels)
    command = ("bench", "kernels", "--shape", "48x64", "--rows", "3", "1", "3", "--seconds", "0")
    return subprocess.run(
        [sys.executable, "-m", "sensorium", *command, "--threads", "1", *arguments],
        env=child_environment() | os.environ | {"XDG_CACHE_HOME": str(folder)},
        capture_output=True,
        text=True,
    )


def test_kernels_are_measured_and_the_choice_is_kept(tmp_path: Path) -> None:
    file, kept = tmp_path / "kernels.json", tmp_path / "sensorium" / "products.json"
    done = bench_kernels(tmp_path, "--formats", "float32", "int8", "--write", "--output", str(file))
    assert done.returncode == 0, done.stderr
    found = json.loads(file.read_text())
    assert (found["benchmark"], found["settings"]["rows"]) == ("kernels", [1, 3])
    assert found["times"].keys() == {"float32", "int8"}
    for form in found["times"].values():
        assert form.keys() == {"1", "3"}
        assert all(value > 0 for row in form.values() for value in row.values())
    assert json.loads(kept.read_text())["times"] == found["times"]
    assert f"written to {kept}" in done.stdout
    assert done.stdout.rstrip().splitlines()[-1].startswith(f"CPU level {found['level']}")


def test_a_choice_that_cannot_be_kept_is_told(tmp_path: Path) -> None:
    (tmp_path / "sensorium" / "products.json").mkdir(parents=True)
    done = bench_kernels(tmp_path, "--formats", "float32", "--write")
    assert done.returncode == 2
    assert "cannot be written" in done.stderr
    assert "Traceback" not in done.stderr
