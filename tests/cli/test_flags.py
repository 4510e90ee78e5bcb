"""Flags are the fields of the configuration; mistakes are told in one line."""

from __future__ import annotations

import argparse
import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from sensorium.cli.flags import (
    add_engine_flags,
    add_server_flags,
    build_engine_config,
    build_server_config,
    engine_keywords,
    flag_of,
)
from sensorium.cli.main import build_parser, main
from sensorium.cli.reference import configuration_markdown
from sensorium.config import ENGINE_SECTIONS, ServerConfig, engine_config, engine_option_names


def parse(*argv: str) -> argparse.Namespace:
    return build_parser().parse_args(["serve", *argv])


def test_every_field_has_a_flag_with_help() -> None:
    parser = argparse.ArgumentParser()
    add_engine_flags(parser)
    add_server_flags(parser)
    shown = parser.format_help()
    for name in (*engine_option_names(), *(f.name for f in dataclasses.fields(ServerConfig))):
        assert f" {flag_of(name)} " in shown or f" {flag_of(name)}," in shown, name
    for cls in (*ENGINE_SECTIONS.values(), ServerConfig):
        assert all(f.metadata["help"] for f in dataclasses.fields(cls))


def test_flags_not_given_leave_the_defaults_alone() -> None:
    arguments = parse("demo")
    assert engine_keywords(arguments) == {}
    assert build_engine_config(arguments) == engine_config()
    assert build_server_config(arguments) == ServerConfig()


def test_values_have_the_types_of_their_fields() -> None:
    arguments = parse(
        "m", "--max-model-len", "512", "--gpu-memory-utilization", "0.5", "--dtype", "float32",
        "--no-enable-prefix-caching", "--enforce-eager", "--hf-overrides", '{"a": {"b": 1}}',
        "--limit-mm-per-prompt", "image=2,video=0",
        "--allowed-media-domains", "a.example", "b.example",
        "--mm-processor-kwargs", '{"max_pixels": 5}',
    )  # fmt: skip
    config = build_engine_config(arguments)
    assert config.model.max_model_len == 512
    assert config.cache.gpu_memory_utilization == 0.5
    assert config.model.dtype == "float32"
    assert not config.cache.enable_prefix_caching
    assert config.model.enforce_eager
    assert config.model.hf_overrides == {"a": {"b": 1}}
    assert config.media.limit_mm_per_prompt == {"image": 2, "video": 0}
    assert config.media.allowed_media_domains == ("a.example", "b.example")
    assert config.media.mm_processor_kwargs == {"max_pixels": 5}


def test_limits_may_be_json() -> None:
    arguments = parse("m", "--limit-mm-per-prompt", '{"video": {"count": 1, "num_frames": 8}}')
    limits = build_engine_config(arguments).media.limit_mm_per_prompt
    assert limits == {"video": {"count": 1, "num_frames": 8}}


def test_several_values_are_repeated_or_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SENSORIUM_API_KEY", "c")
    arguments = parse("m", "--api-key", "a", "--api-key", "b", "--allowed-origins", '["x", "y"]')
    config = build_server_config(arguments)
    assert config.api_key == ("a", "b", "c")
    assert config.allowed_origins == ("x", "y")


def test_underscores_are_hyphens() -> None:
    assert parse("m", "--max_model_len=7").max_model_len == 7
    assert parse("m", "--max_model_len", "7", "--chat-template", "a_b").chat_template == "a_b"


def test_run_is_serve() -> None:
    both = [build_parser().parse_args([name, "m", "--port", "1"]) for name in ("serve", "run")]
    assert both[0] == both[1]


WRONG: list[tuple[list[str], list[str]]] = [
    (["serve", "m", "--max-modl-len", "5"], ["--max-modl-len", "'--max-model-len'"]),
    (["serve", "m", "--max-model", "5"], ["unknown flag --max-model"]),
    (["serve", "m", "--port", "x"], ["--port", "'x'"]),
    (["serve", "m", "--dtype", "int3"], ["--dtype", "int3", "bfloat16"]),
    (["serve", "m", "--hf-overrides", "{"], ["--hf-overrides", "JSON"]),
    (["serve", "m", "--limit-mm-per-prompt", "image=two"], ["--limit-mm-per-prompt", "image=two"]),
    (["serve", "m", "--port", "1", "more"], ["'more'"]),
    (["chat", "m", "more"], ["'more'"]),
    (["serv"], ["serv"]),
    ([], ["COMMAND"]),
]


@pytest.mark.parametrize(("argv", "words"), WRONG, ids=lambda v: " ".join(v)[:40])
def test_mistakes_are_one_line(
    argv: list[str], words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(argv)
    assert caught.value.code == 2
    shown = capsys.readouterr().err
    assert shown.startswith("error: ")
    assert all(word in shown for word in words), shown
    assert "Traceback" not in shown


@pytest.mark.parametrize(
    ("argv", "word"),
    [
        (["serve", "m", "--max-model-len", "0"], "--max-model-len must be between"),
        (["serve", "m", "--port", "70000"], "--port must be between"),
        (["serve", "m", "--ssl-certfile", "a"], "--ssl-certfile"),
        (["serve", "a", "--model", "b"], "twice"),
        (["serve", "m", "--root-path", "llm/"], "--root-path must begin"),
        (["serve", "m", "--metrics-prefix", "a b"], "--metrics-prefix must be"),
        (["serve", "m", "--ssl-certfile", "/no", "--ssl-keyfile", "/no"], "No such file"),
        (["serve", "m", "--host", "no.such.host.invalid"], "no.such.host.invalid"),
        (["serve", "m", "--limit-mm-per-prompt", "smell=1"], "--limit-mm-per-prompt"),
        (["chat", "m", "--image", "/no/such.png"], "No such file"),
        (["chat", "--base-url", "ftp://x"], "--base-url"),
        (["generate", "a", "--image", "/no/such.png"], "No such file"),
    ],
)
def test_wrong_configurations_end_with_status_2(
    argv: list[str], word: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(argv) == 2
    shown = capsys.readouterr().err
    assert shown.startswith("error: ")
    assert word in shown


def test_deprecated_flags_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    config = build_engine_config(parse("m", "--task", "generate"))
    assert config.model.runner == "generate"
    assert capsys.readouterr().err.startswith("warning: task is deprecated")


def run(*argv: str, **keywords: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *argv], capture_output=True, text=True, timeout=300, **keywords
    )


def test_help_needs_nothing_heavy() -> None:
    code = (
        "import sys\n"
        "from sensorium.cli.main import build_parser\n"
        "build_parser().format_help()\n"
        "heavy = ('torch', 'numpy', 'fastapi', 'uvicorn', 'pydantic', 'transformers', 'numba', "
        "'PIL')\n"
        "print([m for m in heavy if m in sys.modules])"
    )
    assert run("-c", code).stdout.strip() == "[]"


def test_the_three_ways_to_call() -> None:
    assert "COMMAND" in run("-m", "sensorium", "--help").stdout
    done = run("-m", "sensorium.entrypoints.openai.api_server", "--model", "m", "--port", "-1")
    assert done.returncode == 2
    assert "--port must be between" in done.stderr


def test_the_page_of_settings_is_up_to_date() -> None:
    page = Path(__file__).parents[2] / "docs" / "configuration.md"
    message = "run scripts/configuration_docs"
    assert page.read_text(encoding="utf-8") == configuration_markdown(), message


def test_the_older_form_of_limits_names_todays(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = parse("m", "--limit-mm-per-prompt", "image=2")
    assert arguments.limit_mm_per_prompt == {"image": 2}
    assert """use --limit-mm-per-prompt '{"image": 2}'""" in capsys.readouterr().err
    parse("m", "--limit-mm-per-prompt", '{"image": 2}')
    assert not capsys.readouterr().err


def test_help_shows_the_ranges_of_numbers() -> None:
    parser = build_parser()
    [commands] = [a for a in parser._actions if hasattr(a, "choices") and a.choices]
    help_of = {a.dest: a.help for a in commands.choices["generate"]._actions}
    assert help_of["block_size"] == "Tokens per block of the KV cache. (1 to 1024; default: 32)"
    assert "(1 to 2^31)" in help_of["max_model_len"]
    assert "(above 0, at most 1)" in help_of["sampling_top_p"]
    assert "(-2^63 to 2^64 - 1)" in help_of["sampling_seed"]
