"""Several models on the command line and in a file: whose option counts, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sensorium.cli.commands import batch
from sensorium.cli.commands.serve import models_of
from sensorium.cli.flags import build_engine_config, build_server_config
from sensorium.cli.main import build_parser, main
from sensorium.cli.options import in_effect
from sensorium.config import ServedConfig
from sensorium.errors import ConfigError


def served(*argv: str) -> list[ServedConfig]:
    """The models of a command line."""
    return [
        ServedConfig(engine=build_engine_config(model), server=build_server_config(model))
        for model in models_of(build_parser().parse_args(["serve", *argv]))
    ]


def written(folder: Path, text: str) -> str:
    path = folder / "serve.yaml"
    path.write_text(text)
    return str(path)


FILE = """
port: 9000
max-model-len: 4K
max-num-seqs: 8
models:
  - demo
  - model: other
    served-model-name: [b, c]
    max-model-len: 2K
    on-demand: true
    model-idle-timeout: 60
    quantization: int8
"""


def test_an_entry_wins_over_the_top_of_the_file(tmp_path: Path) -> None:
    one, two = served("--config", written(tmp_path, FILE))
    assert (one.names, two.names) == (("demo",), ("b", "c"))
    assert [m.engine.model.max_model_len for m in (one, two)] == [4096, 2048]
    assert [m.engine.scheduler.max_num_seqs for m in (one, two)] == [8, 8]
    assert [m.engine.model.quantization for m in (one, two)] == [None, "int8"]
    assert [m.server.on_demand for m in (one, two)] == [False, True]
    assert [m.server.model_idle_timeout for m in (one, two)] == [0, 60]
    assert [m.server.port for m in (one, two)] == [9000, 9000]


def test_a_flag_wins_over_the_entries_of_a_file(tmp_path: Path) -> None:
    path = written(tmp_path, FILE)
    for model in served("--config", path, "--max-model-len", "1K", "--no-on-demand"):
        assert (model.engine.model.max_model_len, model.server.on_demand) == (1024, False)


def test_the_source_of_an_option_is_known_for_each_model(tmp_path: Path) -> None:
    path = written(tmp_path, FILE)
    arguments = build_parser().parse_args(["serve", "--config", path, "--block-size", "16"])
    [_, other] = models_of(arguments)
    found = in_effect(other, build_engine_config(other), build_server_config(other))
    names = ("max_model_len", "max_num_seqs", "block_size", "seed")
    sources = [found[name].source for name in names]
    assert sources == [f"file {path}", f"file {path}", "flag", "default"]


def test_info_shows_each_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "--json", "--config", written(tmp_path, FILE)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert list(found) == ["model demo", "model other"]
    assert found["model other"]["max_model_len"]["value"] == 2048


@pytest.mark.parametrize("argv", [("a", "b"), ("--max-model-len", "1K", "a", "b")])
def test_models_on_the_command_line(argv: tuple[str, ...]) -> None:
    models = served(*argv)
    assert [model.names for model in models] == [("a",), ("b",)]
    assert len({model.engine.model.max_model_len for model in models}) == 1


def test_one_name_for_several_models_is_refused() -> None:
    with pytest.raises(ConfigError, match="--served-model-name names one model"):
        served("a", "b", "--served-model-name", "x")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("models: 3", "models must be a list of models"),
        ("models: []", "models must be a list of models"),
        ("models: [3]", "models[0] must be a model, or flags"),
        ("models: [{max-num-seqs: 3}]", "models[0] needs the key 'model'"),
        ("models: [a, {model: b, port: 1}]", "models[1].port is an option of the whole server"),
        ("models: [a, {model: b, api_key: k}]", "models[1].api_key is an option of the whole"),
        ("models: [{model: a, max-num-sex: 1}]", "models[0]: unknown key 'max-num-sex'. Did you"),
        ("model: a\nmodels: [b]", "models lists all models; name none beside it"),
        ("models: [{model: a, max-num-seqs: many}]", "invalid int value: 'many'"),
    ],
)
def test_a_wrong_list_is_refused(
    text: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        served("--config", written(tmp_path, text))
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


def test_a_batch_may_be_for_several_models(tmp_path: Path) -> None:
    path = written(tmp_path, "models: [demo, {model: other, served-model-name: b}]")
    argv = ["batch", "in.jsonl", "-o", "out.jsonl", "--config", path, "--max-num-seqs", "3"]
    models = batch.models_of(build_parser().parse_args(argv))
    assert [model.names for model in models] == [("demo",), ("b",)]
    assert [model.engine.scheduler.max_num_seqs for model in models] == [3, 3]


def test_other_commands_take_one_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = written(tmp_path, "models: [a, b]")
    for argv in (["chat", "--config", path], ["serve", "a", "--config", path]):
        with pytest.raises(SystemExit):
            build_parser().parse_args(argv)
    shown = capsys.readouterr().err
    assert "this command takes one model, no list" in shown
    assert "models lists all models; name none beside it" in shown
