"""sensorium pull: what it says before, what it refuses, and a download that goes on."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest

from sensorium.cli.main import main
from sensorium.errors import ConfigError
from sensorium.forks import OWN_THREADS
from sensorium.models import hub_gguf
from sensorium.models import needs as needs_module
from sensorium.models.gguf import folder as folders
from sensorium.models.gguf import reader
from sensorium.models.loading import hub as hub_module
from tests import checkpoints
from tests.checkpoints.gguf import write_gguf
from tests.cli.commands.fake_hub import COMMIT, FakeHub

NAME = "some/model"
WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoints.make_text("llama", tmp_path_factory.mktemp("repository") / "model")


@pytest.fixture
def hub(repository: Path) -> Iterator[FakeHub]:
    with FakeHub({NAME: repository}) as made:
        yield made


@dataclass
class Done:
    """What a command has left."""

    returncode: int
    stdout: str
    stderr: str


class Puller:
    """Runs ``sensorium pull`` in this process, with the hub's client set to a fake hub."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self._patch, self._capsys = monkeypatch, capsys

    def __call__(self, hub: FakeHub, cache: Path, *flags: str, model: str = NAME) -> Done:
        for name, value in {
            "ENDPOINT": hub.url,
            "HUGGINGFACE_CO_URL_TEMPLATE": hub.url + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HUB_CACHE": str(cache),
            "HF_HUB_OFFLINE": False,
            "HF_HUB_DISABLE_XET": True,
            "HF_HUB_DISABLE_TELEMETRY": True,
        }.items():
            self._patch.setattr(huggingface_hub.constants, name, value)
        self._patch.setenv("no_proxy", "127.0.0.1")
        status = main(["pull", model, *flags])
        shown = self._capsys.readouterr()
        return Done(status, shown.out, shown.err)


@pytest.fixture
def pull(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Puller:
    return Puller(monkeypatch, capsys)


def needs(done: Done) -> dict[str, Any]:
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_it_says_what_is_needed_and_downloads(
    pull: Puller, hub: FakeHub, repository: Path, tmp_path: Path
) -> None:
    found = needs(pull(hub, tmp_path, "--dry-run", "--json", "--dtype", "float32"))
    size = (repository / WEIGHTS).stat().st_size
    assert (found["download"], found["files"], found["num_files"]) == (size, size, 1)
    assert found["weights"] > 0
    assert found["run"] > found["weights"] + found["context"]
    assert (found["problem"], found["folder"]) == (None, None)
    assert WEIGHTS not in hub.downloaded
    done = pull(hub, tmp_path)
    assert done.returncode == 0, done.stderr
    assert "to download    " in done.stdout
    folder = tmp_path / "models--some--model" / "snapshots" / COMMIT
    assert (folder / WEIGHTS).read_bytes() == (repository / WEIGHTS).read_bytes()
    assert str(folder) in done.stdout
    again = needs(pull(hub, tmp_path, "--json"))
    assert again["download"] == 0
    assert hub.downloaded.count(WEIGHTS) == 1


def test_a_connection_that_breaks_off_is_resumed(
    pull: Puller,
    hub: FakeHub,
    repository: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "DOWNLOAD_CHUNK_SIZE", 1000)
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    hub.breaks = [20_000, 30_000]
    done = pull(hub, tmp_path)
    assert done.returncode == 0, done.stderr
    assert hub.ranges == ["bytes=20000-", "bytes=50000-"]
    folder = tmp_path / "models--some--model" / "snapshots" / COMMIT
    assert (folder / WEIGHTS).read_bytes() == (repository / WEIGHTS).read_bytes()


@pytest.fixture
def resumed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files of all sizes stay for the next process; no time is spent between attempts."""
    monkeypatch.setattr(hub_module, "RESUMED_BYTES", 0)
    monkeypatch.setattr(hub_module, "CHUNK_BYTES", 1000)
    monkeypatch.setattr(hub_module, "WAIT_SECONDS", 0.0)
    monkeypatch.setattr("time.sleep", lambda seconds: None)


def partial_of(cache: Path) -> list[Path]:
    return list(cache.rglob("*.incomplete"))


@pytest.mark.usefixtures("resumed")
def test_a_file_that_another_process_began_goes_on(
    pull: Puller, hub: FakeHub, repository: Path, tmp_path: Path
) -> None:
    """The first command ends in the middle: what it had stays as it is."""
    whole = (repository / WEIGHTS).read_bytes()
    hub.breaks = [20_000, 30_000, *[0] * 20]
    assert pull(hub, tmp_path).returncode == 2
    [partial] = partial_of(tmp_path)
    assert partial.read_bytes() == whole[:50_000]
    hub.breaks, hub.ranges = [], []
    done = pull(hub, tmp_path)
    assert done.returncode == 0, done.stderr
    assert hub.ranges == ["bytes=50000-"]
    folder = tmp_path / "models--some--model" / "snapshots" / COMMIT
    assert (folder / WEIGHTS).read_bytes() == whole
    assert not partial_of(tmp_path)
    num_downloads = len(hub.downloaded)
    assert pull(hub, tmp_path).returncode == 0
    assert len(hub.downloaded) == num_downloads


@pytest.mark.usefixtures("resumed")
@pytest.mark.parametrize("size", [50_000, 1 << 24])
def test_a_file_that_is_not_what_the_hub_has_is_downloaded_again(
    pull: Puller, hub: FakeHub, repository: Path, tmp_path: Path, size: int
) -> None:
    hub.breaks = [20_000, *[0] * 20]
    assert pull(hub, tmp_path).returncode == 2
    [partial] = partial_of(tmp_path)
    partial.write_bytes(b"x" * size)
    hub.breaks = []
    done = pull(hub, tmp_path)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "models--some--model" / "snapshots" / COMMIT
    assert (folder / WEIGHTS).read_bytes() == (repository / WEIGHTS).read_bytes()
    assert not partial_of(tmp_path)


@pytest.mark.usefixtures("resumed")
def test_a_part_that_begins_elsewhere_is_not_taken(
    pull: Puller, hub: FakeHub, repository: Path, tmp_path: Path
) -> None:
    hub.breaks, hub.num_shifted = [20_000], 1
    done = pull(hub, tmp_path)
    assert done.returncode == 0, done.stderr
    assert hub.ranges == ["bytes=20000-"], "the next attempt begins again"
    assert "did not arrive as it is" not in done.stderr
    folder = tmp_path / "models--some--model" / "snapshots" / COMMIT
    assert (folder / WEIGHTS).read_bytes() == (repository / WEIGHTS).read_bytes()


@pytest.mark.usefixtures("resumed")
def test_a_download_that_fails_does_not_wait_for_the_others(
    pull: Puller, repository: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(repository, folder)
    (folder / WEIGHTS).rename(folder / "one.safetensors")
    (folder / "two.safetensors").write_bytes(bytes(60_000))
    index = {"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps(index))
    gate = threading.Event()
    with FakeHub({NAME: folder}, breaks=[0] * 20, held={"two.safetensors": gate}) as hub:
        assert pull(hub, tmp_path / "cache").returncode == 2
        assert not gate.is_set(), "the other is on its way"
        gate.set()
        for thread in threading.enumerate():
            if thread.name.startswith(f"{OWN_THREADS}hub"):
                thread.join(60)
                assert not thread.is_alive()
    sizes = [partial.stat().st_size for partial in partial_of(tmp_path)]
    assert max(sizes) < 60_000, "it was not downloaded to its end"


def test_a_connection_that_breaks_off_again_and_again(
    pull: Puller, hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    hub.breaks = [0] * 100
    done = pull(hub, tmp_path)
    assert done.returncode == 2
    assert "the connection to the hub broke off, several times" in done.stderr
    hub.breaks = []
    assert pull(hub, tmp_path).returncode == 0
    assert hub.downloaded.count("config.json") == 1, "what is complete stays"


def test_a_model_that_does_not_fit_is_refused_before_its_weights_are_fetched(
    pull: Puller, hub: FakeHub, tmp_path: Path
) -> None:
    hub.sizes[WEIGHTS] = 1 << 50
    done = pull(hub, tmp_path)
    assert done.returncode == 2
    assert "is not downloaded: 1048576.0 GiB are to be downloaded, but" in done.stderr
    assert "--download-dir" in done.stderr
    assert WEIGHTS not in hub.downloaded
    assert pull(hub, tmp_path, "--force").returncode == 2, "the disk is full anyway"


def test_weights_that_are_larger_than_the_memory(
    pull: Puller, hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(needs_module, "total_memory", lambda: 1 << 29)
    done = pull(hub, tmp_path)
    assert done.returncode == 2
    assert "there are 0.5 GiB of memory in all" in done.stderr
    assert WEIGHTS not in hub.downloaded
    forced = pull(hub, tmp_path, "--force")
    assert forced.returncode == 0
    assert "warning: its weights take" in forced.stderr
    assert WEIGHTS in hub.downloaded


def change(repository: Path, folder: Path, **values: Any) -> Path:
    """Return a copy of a repository with other values in its config.json."""
    shutil.copytree(repository, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **values}))
    return folder


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"architectures": ["NoSuchModel"], "model_type": "no_such"}, "NoSuchModel"),
        ({"num_attention_heads": 0}, "num_attention_heads"),
    ],
)
def test_what_cannot_run_is_refused_early(
    pull: Puller, values: dict[str, Any], words: str, repository: Path, tmp_path: Path
) -> None:
    with FakeHub({NAME: change(repository, tmp_path / "model", **values)}) as hub:
        done = pull(hub, tmp_path / "cache")
    assert done.returncode == 2, done.stderr
    assert words in done.stderr
    assert "Traceback" not in done.stderr
    assert WEIGHTS not in hub.downloaded


def test_a_repository_of_pickles(pull: Puller, repository: Path, tmp_path: Path) -> None:
    folder = change(repository, tmp_path / "model")
    (folder / WEIGHTS).rename(folder / "pytorch_model.bin")
    with FakeHub({NAME: folder}) as hub:
        done = pull(hub, tmp_path / "cache")
    assert done.returncode == 2
    assert "has pickle files only (pytorch_model.bin)" in done.stderr
    assert "pytorch_model.bin" not in hub.downloaded


def test_a_repository_that_is_not_there(pull: Puller, tmp_path: Path) -> None:
    with FakeHub({}) as hub:
        done = pull(hub, tmp_path)
    assert done.returncode == 2
    assert "has no such model" in done.stderr


def test_what_is_here_already(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for name in ("demo", str(tmp_path)):
        assert main(["pull", name]) == 2
        assert "is here already" in capsys.readouterr().err


def test_a_gguf_file_is_described_from_its_beginning(
    pull: Puller,
    repository: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(folders, "cache_root", lambda: tmp_path / "caches")
    monkeypatch.setattr(hub_gguf, "GGUF_BEGINNING", 1 << 16)
    source, name = tmp_path / "files", "model-q8_0.gguf"
    source.mkdir()
    write_gguf(repository, source / name, "Q8_0")
    size = (source / name).stat().st_size
    with FakeHub({NAME: source}) as hub:
        found = needs(pull(hub, tmp_path, "--dry-run", "--json", model=f"{NAME}:{name}"))
        assert found["format"] == "GGUF version 3, llama: Q8_0"
        assert (found["files"], found["download"], found["num_files"]) == (size, size, 1)
        assert hub.ranges == ["bytes=0-65535"]
        encoder = source / "mmproj.gguf"
        write_gguf(repository, encoder)
        both = size + encoder.stat().st_size
        flags = ("--dry-run", "--json", "--mmproj")
        found = needs(pull(hub, tmp_path, *flags, encoder.name, model=f"{NAME}:{name}"))
        assert (found["files"], found["num_files"]) == (both, 2)
        done = pull(hub, tmp_path, *flags, "absent.gguf", model=f"{NAME}:{name}")
        assert done.returncode == 2
        assert "has no file 'absent.gguf'" in done.stderr
        done = pull(hub, tmp_path, "--mmproj", encoder.name, model=f"{NAME}:{name}")
        assert done.returncode == 2, "it is fetched and read, and is no encoder"
        assert encoder.name in done.stderr
        done = pull(hub, tmp_path, model=f"{NAME}:other.gguf")
        assert done.returncode == 2
        assert name in done.stderr
        done = pull(hub, tmp_path, model=f"{NAME}:{name}")
    assert done.returncode == 0, done.stderr
    assert len(list(tmp_path.rglob(f"snapshots/*/{name}"))) == 1


def test_factors_of_rotary_positions_are_fetched_by_themselves(
    pull: Puller, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of Llama 3.1 and later are a tensor, which may lie behind the beginning."""
    monkeypatch.setattr(hub_gguf, "GGUF_BEGINNING", 1 << 16)
    scaling = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    model = checkpoints.make_text("llama", tmp_path / "model", rope_scaling=scaling)
    source, name = tmp_path / "files", "model-q8_0.gguf"
    source.mkdir()
    write_gguf(model, source / name, "Q8_0")
    info = reader.read(source / name).tensors["rope_freqs.weight"]
    assert info.start > 1 << 16
    with FakeHub({NAME: source}) as hub:
        found = needs(pull(hub, tmp_path, "--dry-run", "--json", model=f"{NAME}:{name}"))
        assert found["problem"] is None
        last = info.start + info.nbytes - 1
        assert hub.ranges == ["bytes=0-65535", f"bytes={info.start}-{last}"]
        data = (source / name).read_bytes()
        assert hub_module.piece(NAME, name, None, 1000, 8) == data[1000:1008]
        hub.num_shifted = 1
        with pytest.raises(ConfigError, match="does not send a part of"):
            hub_module.piece(NAME, name, None, 1000, 8)


def test_all_parts_of_a_gguf_file_are_downloaded(
    pull: Puller, repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folders, "cache_root", lambda: tmp_path / "caches")
    monkeypatch.setattr(hub_gguf, "GGUF_BEGINNING", 1 << 16)
    source = tmp_path / "files"
    (source / "q8").mkdir(parents=True)
    write_gguf(repository, source / "q8" / "model.gguf", "Q8_0", per_part=8)
    names = [f"q8/{path.name}" for path in sorted((source / "q8").iterdir())]
    size = sum((source / name).stat().st_size for name in names)
    with FakeHub({NAME: source}) as hub:
        found = needs(pull(hub, tmp_path, "--dry-run", "--json", model=f"{NAME}:{names[0]}"))
        assert (found["files"], found["download"], found["num_files"]) == (size, size, 3)
        done = pull(hub, tmp_path, model=f"{NAME}:{names[0]}")
        assert done.returncode == 0, done.stderr
        again = needs(pull(hub, tmp_path, "--json", model=f"{NAME}:{names[0]}"))
        assert again["download"] == 0
        asked = len(hub.downloaded)
        other = pull(hub, tmp_path, "--dry-run", model=f"{NAME}:{names[1]}")
        assert f"name its first, {names[0]}" in other.stderr
        assert len(hub.downloaded) == asked
    assert len(list(tmp_path.rglob("snapshots/*/q8/*.gguf"))) == 3
