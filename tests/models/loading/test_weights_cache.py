"""Quantized weights that are kept: what a second start takes, and all that can be wrong with it."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import shutil
import stat
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from sensorium.config import engine_config
from sensorium.engine.loading import LEAST_KEPT, weights_cache
from sensorium.forks import OWN_THREADS
from sensorium.kernels import ops
from sensorium.kernels.weight import PackedWeight
from sensorium.models import loader
from sensorium.models.loading import calibrate, stored
from sensorium.models.loading import weights_cache as module
from sensorium.models.loading.quantize import WeightFormats
from sensorium.models.loading.weight_files import FileState
from sensorium.models.loading.weights_cache import FOLDER, CacheSettings
from tests import checkpoints
from tests.checkpoints.quantized import quantize
from tests.models.harness import Harness
from tests.models.loading.published.forms import FORMS

pytestmark = pytest.mark.skipif(
    not ops.has_integer_products(), reason="this CPU has no products of quantized weights"
)
MOST = 1 << 30
INT4 = WeightFormats(decoder="int4", encoder="int8", head="int8")
HIT, MISS = "weights cache: hit", "weights cache: miss"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoints.make_text("qwen2", tmp_path_factory.mktemp("qwen2"))


@pytest.fixture(scope="module")
def kept(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a cache that has the weights of the checkpoint in int4."""
    folder = tmp_path_factory.mktemp("kept")
    load(checkpoint, folder)
    return folder


def load(
    checkpoint: Path, cache: Path | None, formats: WeightFormats = INT4, **options: Any
) -> loader.LoadedModel:
    settings = None if cache is None else CacheSettings(cache, options.pop("most", MOST))
    options = {"dtype": "bfloat16", "device": "cpu", **options}
    return loader.load(str(checkpoint), formats=formats, weights_cache=settings, **options)


def packed(loaded: loader.LoadedModel) -> dict[str, dict[str, torch.Tensor]]:
    """The packed tensors of a model's layers, by slot."""
    model: Any = loaded.model
    return {
        f"{number} {place}": layer.weight.tensors()
        for number, slot in enumerate(model.slots())
        for place, layer in enumerate(slot.layers)
        if isinstance(layer.weight, PackedWeight) and layer.weight.has_rows
    }


def assert_same(found: loader.LoadedModel, expected: loader.LoadedModel) -> None:
    ours, theirs = packed(found), packed(expected)
    assert ours.keys() == theirs.keys()
    for name, tensors in theirs.items():
        for key, tensor in tensors.items():
            assert torch.equal(ours[name][key], tensor), (name, key)
    ids = list(range(30, 50))
    logits = []
    for loaded in (found, expected):
        harness = Harness(loaded)
        logits.append(harness.prefill(harness.add(ids)))
    assert torch.equal(*logits)


def only_file(cache: Path) -> Path:
    [path] = (cache / FOLDER).iterdir()
    return path


def copied(kept: Path, folder: Path) -> Path:
    """A copy of a cache, that a test may damage."""
    shutil.copytree(kept, folder / "copy")
    return folder / "copy"


def refuse(*_: object, **__: object) -> Any:
    raise AssertionError("a weight is made again")


def test_a_second_start_neither_calibrates_nor_quantizes(
    checkpoint: Path,
    kept: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    expected = load(checkpoint, None)
    monkeypatch.setattr(calibrate, "mean_squares", refuse)
    monkeypatch.setattr(ops, "quantize_and_pack", refuse)
    with caplog.at_level(logging.INFO):
        found = load(checkpoint, kept)
    assert HIT in caplog.text
    assert_same(found, expected)
    model: Any = found.model
    assert model.decoder.embedding.weight is model.decoder.head.linear.weight


@pytest.mark.parametrize("family", ["llava", "ultravox", "minicpmv", "qwen2_5_vl", "phi3_v"])
def test_encoders_and_biases(tmp_path: Path, family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    getattr(checkpoints, f"make_{family}")(folder)
    formats = WeightFormats(decoder="int8", encoder="int4", head="int4")
    expected = load(folder, tmp_path / "cache", formats)
    num_made: list[torch.Tensor] = []
    original = ops.quantize_and_pack

    def counted(weight: torch.Tensor, *rest: Any) -> PackedWeight:
        num_made.append(weight)
        return original(weight, *rest)

    monkeypatch.setattr(ops, "quantize_and_pack", counted)
    assert_same(load(folder, tmp_path / "cache", formats), expected)
    # Layers whose slot sets more than a weight and a bias are made at every start.
    assert len(num_made) <= 3


def test_what_makes_other_weights_has_another_file(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = checkpoints.make_text("llama", tmp_path / "model")
    cache = tmp_path / "cache"
    caplog.set_level(logging.INFO)

    def misses(**options: Any) -> bool:
        caplog.clear()
        load(folder, cache, **options)
        assert (HIT in caplog.text) != (MISS in caplog.text)
        return MISS in caplog.text

    assert misses()
    assert not misses()
    int8 = WeightFormats(decoder="int8", head="int8")
    assert misses(formats=int8)
    assert misses(dtype="float32")
    assert misses(hf_overrides={"rope_theta": 1234.0})
    assert misses(runner="pooling")
    assert len(list((cache / FOLDER).iterdir())) == 5
    assert not misses()
    # Calibration runs through the products of floats.
    monkeypatch.setattr(ops, "products", lambda: "others")
    assert misses()
    assert not misses(formats=int8)


def test_a_changed_checkpoint_is_another_one(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    tensors = {"a": torch.zeros(1 << 20), "b": torch.zeros(64)}
    save_file(tensors, path)
    before, identity = FileState.of(path), FileState.of(path).identity()
    assert FileState.of(path).identity() == identity
    tensors["a"] += 1
    save_file(tensors, path)
    os.utime(path, ns=(before.modified_ns, before.modified_ns))
    after = FileState.of(path)
    assert (after.size, after.modified_ns) == (before.size, before.modified_ns)
    assert after.identity() != identity
    # The content alone tells it, too: some file systems have no times.
    same_times = FileState(path, before.size, before.modified_ns, before.changed_ns)
    assert same_times.identity() != identity
    touched = FileState.of(path).identity()
    os.utime(path)
    assert FileState.of(path).identity() != touched


def flipped(place: float) -> Callable[[Path], object]:
    def damage(path: Path) -> None:
        data = bytearray(path.read_bytes())
        data[int(place * (len(data) - 1))] ^= 0x40
        path.write_bytes(data)

    return damage


def in_a_tensor(path: Path) -> None:
    """Change a byte of the last tensor: those before it are good."""
    data = path.read_bytes()
    length = int.from_bytes(data[-stored.END_BYTES :][:8], "little")
    index = json.loads(data[-stored.END_BYTES - length : -stored.END_BYTES])
    *_, last = index["weights"].values()
    changed = bytearray(data)
    changed[last["tensors"]["packed"]["start"]] ^= 1
    path.write_bytes(changed)


def other_key(path: Path) -> None:
    """Put another model's file in its place, whole as it is."""
    other = path.with_name("0" * 40 + stored.SUFFIX)
    writer = stored.StoredWriter.begin(other, "0" * 40, MOST)
    writer.end()
    other.replace(path)


def linked(path: Path) -> None:
    path.rename(path.parent.parent / "elsewhere")
    path.symlink_to(path.parent.parent / "elsewhere")


def shapes_that_lie(path: Path) -> None:
    """Write a whole file whose weights have other sizes than their tensors."""
    writer = stored.StoredWriter.begin(path, path.stem, MOST)
    opened = stored.StoredWeights.open(path, path.stem)
    assert opened is not None
    for name in opened.names:
        writer.write(name, opened.load(name))
        writer.index[name]["shape"] = [16 * n for n in writer.index[name]["shape"]]
    writer.end()
    opened.close()


DAMAGES: dict[str, Callable[[Path], object]] = {
    "tensor": in_a_tensor,
    "index": lambda path: flipped(0.9999)(path),
    "end": flipped(1.0),
    "half": lambda path: os.truncate(path, path.stat().st_size // 2),
    "empty": lambda path: os.truncate(path, 0),
    "text": lambda path: path.write_text("weights? " * 1000),
    "other key": other_key,
    "link": linked,
    "shapes": shapes_that_lie,
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_or_foreign_file_is_a_miss(
    checkpoint: Path,
    kept: Path,
    tmp_path: Path,
    damage: Callable[[Path], object],
    caplog: pytest.LogCaptureFixture,
) -> None:
    cache = copied(kept, tmp_path)
    damage(only_file(cache))
    caplog.set_level(logging.INFO)
    found = load(checkpoint, cache)
    [warning] = [r for r in caplog.records if r.levelno == logging.WARNING]
    assert "cannot be used" in warning.getMessage()
    assert MISS in caplog.text
    assert_same(found, load(checkpoint, kept))
    caplog.clear()
    load(checkpoint, cache)
    assert HIT in caplog.text  # the file is whole again


def test_a_folder_in_the_place_of_the_file(
    checkpoint: Path, kept: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache = copied(kept, tmp_path)
    path = only_file(cache)
    path.unlink()
    (path / "inner").mkdir(parents=True)
    assert_same(load(checkpoint, cache), load(checkpoint, kept))
    assert "cannot be kept" in caplog.text
    assert (path / "inner").is_dir()
    assert list(path.parent.iterdir()) == [path]


def not_a_folder(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache.write_text("")


def somebody_elses(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (cache / "elsewhere").mkdir(parents=True)
    (cache / FOLDER).symlink_to(cache / "elsewhere")


def full(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stored, "FREE_BYTES", 1 << 60)


@pytest.mark.parametrize("refuses", [not_a_folder, somebody_elses, full])
def test_a_disk_that_refuses_is_one_warning(
    checkpoint: Path,
    kept: Path,
    tmp_path: Path,
    refuses: Callable[[Path, pytest.MonkeyPatch], None],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    refuses(tmp_path / "cache", monkeypatch)
    found = load(checkpoint, tmp_path / "cache")
    assert caplog.text.count("cannot be kept") == 1
    assert not [*tmp_path.rglob(f"*{stored.SUFFIX}"), *tmp_path.rglob("*.part")]
    monkeypatch.undo()
    assert_same(found, load(checkpoint, kept))


@pytest.mark.parametrize(
    ("method", "error"),
    [("write", MemoryError()), ("write", RuntimeError("odd")), ("end", RuntimeError("odd"))],
    ids=repr,
)
def test_whatever_a_writer_raises_is_one_warning(
    checkpoint: Path,
    tmp_path: Path,
    method: str,
    error: Exception,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    original = getattr(stored.StoredWriter, method)
    calls: list[object] = []

    def fail_late(*args: Any) -> Any:
        calls.append(args)
        if method == "end" or len(calls) == 2:
            raise error
        return original(*args)

    monkeypatch.setattr(stored.StoredWriter, method, fail_late)
    load(checkpoint, tmp_path)
    assert caplog.text.count("cannot be kept") == 1
    assert (str(error) or type(error).__name__) in caplog.text
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_weights_are_not_read_long_before_they_are_asked_for(
    checkpoint: Path,
    kept: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    num_read, num_found, ahead = 0, 0, []

    class Counted(ThreadPoolExecutor):
        def submit(self, fn: Any, /, *args: Any, **options: Any) -> Future[Any]:
            nonlocal num_read
            num_read += 1
            ahead.append(num_read - num_found)
            return super().submit(fn, *args, **options)

    original = module.WeightsCache.find

    def find(*args: Any) -> PackedWeight | None:
        nonlocal num_found
        num_found += 1
        return original(*args)

    monkeypatch.setattr(module, "ThreadPoolExecutor", Counted)
    monkeypatch.setattr(module.WeightsCache, "find", find)
    monkeypatch.setattr(module, "READ_AHEAD", 0)
    with caplog.at_level(logging.INFO):
        load(checkpoint, kept)
    assert HIT in caplog.text
    assert num_read == num_found > 4
    assert max(ahead) == 1


def test_the_folder_is_private_and_bounded(
    checkpoint: Path, kept: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache = copied(kept, tmp_path)
    own = only_file(cache)
    folder, size = own.parent, own.stat().st_size
    folder.chmod(0o755)
    others = [folder / f"{letter * 40}{stored.SUFFIX}" for letter in "abc"]
    for age, path in enumerate(others):
        path.write_bytes(bytes(size))
        os.utime(path, (1000 - age, 1000 - age))
    left, busy = folder / "x.part", folder / "y.part"
    left.write_bytes(b"")
    writing = busy.open("wb")
    fcntl.flock(writing, fcntl.LOCK_EX)
    stranger = folder / "notes.txt"
    stranger.write_text("mine")
    formats = WeightFormats(decoder="int4", head="int4")
    load(checkpoint, cache, formats, most=int(3.5 * size))
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    names = {path.name for path in folder.iterdir()}
    new = names - {path.name for path in (own, *others, left, busy, stranger)}
    assert len(new) == 1
    assert stat.S_IMODE((folder / new.pop()).stat().st_mode) == 0o600
    # The two that were used longest ago made room; ``own`` was used last.
    assert others[0].exists()
    assert own.exists()
    assert not others[1].exists()
    assert not others[2].exists()
    assert not left.exists()
    assert busy.exists()
    writing.close()
    assert stranger.read_text() == "mine"
    caplog.set_level(logging.INFO)
    load(checkpoint, cache, WeightFormats(decoder="int8", head="int8"), most=size // 4)
    assert "they are not kept" in caplog.text
    assert others[0].exists()


def test_reading_counts_as_use(checkpoint: Path, kept: Path) -> None:
    path = only_file(kept)
    os.utime(path, (1, 1))
    load(checkpoint, kept)
    assert path.stat().st_mtime > 1


def test_a_checkpoint_that_changes_meanwhile_is_not_kept(tmp_path: Path) -> None:
    folder = checkpoints.make_text("qwen2", tmp_path / "model")
    path = folder / "model.safetensors"

    def touch() -> None:
        os.utime(path)

    load(folder, tmp_path / "cache", proceed=touch)
    assert not list((tmp_path / "cache" / FOLDER).iterdir())


def test_loading_that_ends_leaves_nothing(checkpoint: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    calls: list[None] = []

    def proceed() -> None:
        calls.append(None)
        if len(calls) == 6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        load(checkpoint, cache, WeightFormats(decoder="int8", head="int8"), proceed=proceed)
    assert not [path for path in cache.rglob("*") if path.is_file()]
    names = [thread.name for thread in threading.enumerate()]
    assert not [name for name in names if name.startswith(f"{OWN_THREADS}weights")]


BOTH = """
import sys
from pathlib import Path
from tests.models.loading.test_weights_cache import load, stored
stored.FREE_BYTES = 0
print("ready", flush=True)
sys.stdin.readline()
load(Path(sys.argv[1]), Path(sys.argv[2]))
"""


def test_two_that_start_at_once(checkpoint: Path, kept: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    command = [sys.executable, "-c", BOTH, str(checkpoint), str(cache)]
    both = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    for process in both:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in both:
        process.communicate("\n", timeout=120)
    assert [process.returncode for process in both] == [0, 0]
    assert only_file(cache).suffix == stored.SUFFIX
    assert_same(load(checkpoint, cache), load(checkpoint, kept))


def test_a_stored_head_alone_serves_the_embedding(tmp_path: Path) -> None:
    folder = checkpoints.make_text("qwen2", tmp_path / "model")
    path = folder / "model.safetensors"
    tensors = load_file(path)
    name = next(name for name in tensors if name.endswith("embed_tokens.weight"))
    tensors["lm_head.weight"] = tensors.pop(name)
    save_file(tensors, path, metadata={"format": "pt"})
    first = load(folder, tmp_path / "cache")
    assert_same(load(folder, tmp_path / "cache"), first)


def test_options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    default = weights_cache(engine_config())
    assert default == CacheSettings(tmp_path / "sensorium", 16 << 30, LEAST_KEPT)
    given = weights_cache(engine_config(weights_cache=str(tmp_path / "x"), weights_cache_gb=0.5))
    assert given == CacheSettings(tmp_path / "x", 1 << 29)
    assert weights_cache(engine_config(weights_cache="off")) is None
    assert weights_cache(engine_config(weights_cache_gb=0)) is None
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert weights_cache(engine_config()) is None


def test_few_weights_are_not_worth_a_file(checkpoint: Path, tmp_path: Path) -> None:
    settings = CacheSettings(tmp_path / "cache", MOST, LEAST_KEPT)
    loader.load(str(checkpoint), formats=INT4, weights_cache=settings)
    assert not (tmp_path / "cache").exists()
    loader.load(str(checkpoint), weights_cache=CacheSettings(tmp_path / "cache", MOST))
    assert not (tmp_path / "cache").exists()  # nothing is quantized


def test_the_quantizers_decide_the_key(
    checkpoint: Path, kept: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other sources make other weights."""
    state = FileState.of(checkpoint / "model.safetensors")
    before = module.key_of([state], "int4")
    assert before == module.key_of([state], "int4")
    monkeypatch.setattr(module, "sources_digest", lambda: "others")
    assert module.key_of([state], "int4") != before


def test_all_sources_that_make_weights_decide_the_key(tmp_path: Path) -> None:
    for folder in module.SOURCES:
        shutil.copytree(
            module.PACKAGE / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__")
        )
    digests = [module.sources_digest(), module.sources_digest(tmp_path)]
    assert digests[0] == digests[1]
    sources = ["kernels/ops.py", "kernels/weight.py", "layers/linear.py", "models/loader.py"]
    sources.append("distributed/shard.py")
    for source in sources:
        with (tmp_path / source).open("a") as file:
            file.write("\n")
        module.sources_digest.cache_clear()
        digests.append(module.sources_digest(tmp_path))
    assert len(set(digests)) == 1 + len(sources)


def test_settings_beside_config_json_are_in_the_key(tmp_path: Path) -> None:
    """The zero points of the two versions of GPTQ differ by one."""
    folder, cache = tmp_path / "model", tmp_path / "cache"
    checkpoints.make_text("llama", folder, intermediate_size=128)
    quantize(folder, FORMS["gptq"].write, None)
    for version in ("gptq", "gptq_v2"):
        settings = dict(FORMS["gptq"].settings) | {"checkpoint_format": version}
        (folder / "quantize_config.json").write_text(json.dumps(settings))
        found = load(folder, cache, WeightFormats())
        assert_same(found, load(folder, None, WeightFormats()))
    assert len(list((cache / FOLDER).iterdir())) == 2
