"""Flags in a file: what wins, what is refused, and what the options in effect are."""

from __future__ import annotations

import argparse
import json
import logging
import socket
from pathlib import Path

import pytest

from sensorium.cli.config_file import MAX_FILE_CHARACTERS
from sensorium.cli.flags import build_engine_config, build_server_config
from sensorium.cli.main import build_parser, main
from sensorium.cli.options import in_effect, not_default


def parse(*argv: str) -> argparse.Namespace:
    return build_parser().parse_args(["serve", *argv])


def sources(arguments: argparse.Namespace) -> dict[str, str]:
    engine, server = build_engine_config(arguments), build_server_config(arguments)
    return {name: option.source for name, option in in_effect(arguments, engine, server).items()}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "serve.yaml"
    path.write_text(
        "port: 9000\nmax_num_seqs: 5\nimage-fetch-timeout: 2.5\nlog-level: warning\n"
        "tensor-parallel-size: 1\n"
    )
    return path


def test_a_flag_wins_over_the_environment_the_file_and_the_default(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SENSORIUM_IMAGE_FETCH_TIMEOUT", "7")
    monkeypatch.setenv("SENSORIUM_LOG_LEVEL", "error")
    arguments = parse("demo", "--config", str(file), "--port", "1234")
    engine, server = build_engine_config(arguments), build_server_config(arguments)
    assert server.port == 1234
    assert engine.media.image_fetch_timeout == 7
    assert server.log_level is None, "the environment sets it"
    assert engine.scheduler.max_num_seqs == 5
    found = sources(arguments)
    assert found["port"] == "flag"
    assert found["image_fetch_timeout"] == "environment SENSORIUM_IMAGE_FETCH_TIMEOUT"
    assert found["log_level"] == "environment SENSORIUM_LOG_LEVEL"
    assert found["max_num_seqs"] == f"file {file}"
    assert found["block_size"] == "default"


def test_a_flag_wins_over_the_environment_without_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_IMAGE_FETCH_TIMEOUT", "7")
    arguments = parse("demo", "--image-fetch-timeout", "3")
    assert build_engine_config(arguments).media.image_fetch_timeout == 3
    assert sources(arguments)["image_fetch_timeout"] == "flag"
    assert sources(parse("demo"))["image_fetch_timeout"] == "environment VLLM_IMAGE_FETCH_TIMEOUT"


@pytest.mark.parametrize(
    ("key", "near"),
    [
        ("prot", "port"),
        ("max_num_seq", "max-num-seqs"),
        ("served-model-names", "served-model-name"),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest(
    key: str, near: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(f"{key}: 1\n")
    with pytest.raises(SystemExit) as caught:
        parse("demo", "--config", str(path))
    assert caught.value.code == 2
    shown = capsys.readouterr().err
    assert f"{path}: unknown key {key!r}. Did you mean {near!r}?" in shown


def test_each_command_has_keys_of_its_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "doctor.yaml"
    path.write_text("port: 9001\nquick: true\nstrict: false\n")
    arguments = build_parser().parse_args(["doctor", "--config", str(path)])
    assert (arguments.port, arguments.quick, arguments.strict) == (9001, True, False)
    path.write_text("max-num-seqs: 3\n")
    with pytest.raises(SystemExit):
        build_parser().parse_args(["doctor", "--config", str(path)])
    assert "unknown key 'max-num-seqs'" in capsys.readouterr().err


def test_values_of_every_kind(tmp_path: Path) -> None:
    path = tmp_path / "chat.yaml"
    path.write_text(
        "image: [a.png, b.png]\nstop: ['-', '.']\nsystem: '--dashes'\nmarkdown: false\n"
        "temperature: 0\nlimit-mm-per-prompt: {image: 2}\nenable-prefix-caching: no\n"
    )
    arguments = build_parser().parse_args(["chat", "demo", "--config", str(path)])
    assert [attachment.source for attachment in arguments.attachments] == ["a.png", "b.png"]
    assert arguments.sampling_stop == ["-", "."]
    assert arguments.system == "--dashes"
    assert arguments.markdown is False
    assert arguments.sampling_temperature == 0
    config = build_engine_config(arguments)
    assert config.media.limit_mm_per_prompt == {"image": 2}
    assert config.cache.enable_prefix_caching is False


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--config", "a", "--config", "b"], "one YAML file"),
        (["--config"], "one YAML file"),
        (["--config="], "one YAML file"),
    ],
)
def test_one_file_alone(argv: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse("demo", *argv)
    assert words in capsys.readouterr().err


def test_a_file_within_a_file_and_before_the_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("config: b.yaml\n")
    for argv in (["serve", "--config", str(path)], ["--config", str(path), "serve"]):
        with pytest.raises(SystemExit):
            build_parser().parse_args(argv)
        assert "--config comes once" in capsys.readouterr().err


def test_a_file_that_is_too_long(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "long.yaml"
    path.write_text("#" * (MAX_FILE_CHARACTERS + 1))
    with pytest.raises(SystemExit):
        parse("--config", str(path))
    assert "is longer than" in capsys.readouterr().err


def test_info_shows_the_options_in_effect(
    file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SENSORIUM_API_KEY", "sk-secret")
    assert main(["info", "--config", str(file), "--max-model-len", "8k", "--json"]) == 0
    text = capsys.readouterr().out
    assert "sk-secret" not in text
    found = json.loads(text)
    assert found["set"]["port"] == {"value": 9000, "source": f"file {file}"}
    assert found["set"]["max_model_len"] == {"value": 8000, "source": "flag"}
    assert found["set"]["api_key"] == {"value": "1 set", "source": "environment SENSORIUM_API_KEY"}
    assert found["default"]["block_size"] == 32
    assert main(["info", "--port", "1"]) == 0
    assert "  port     1  (flag)" in capsys.readouterr().out


def test_the_line_of_the_log_names_what_is_set(file: Path) -> None:
    arguments = parse("--config", str(file), "--chat-template", "x" * 500, "--api-key", "sk-secret")
    engine, server = build_engine_config(arguments), build_server_config(arguments)
    line = not_default(arguments, engine, server)
    assert f"port=9000 (file {file})" in line
    assert 'api_key="1 set" (flag)' in line
    assert "sk-secret" not in line
    assert len(line) < 1000
    assert "block_size" not in line


def test_the_log_of_a_start_begins_with_the_options(
    file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert main(["serve", "demo", "--config", str(file), "--port", str(port)]) == 2
    [line] = [text for text in caplog.messages if text.startswith("options: ")]
    assert f'model="demo" (flag), max_num_seqs=5 (file {file}), ' in line
    assert f"port={port} (flag)" in line
