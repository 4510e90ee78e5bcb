"""Compiling, caching and running kernels."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from sensorium.kernels import ops
from sensorium.kernels.cpu import amx, elementwise, launch, threads
from sensorium.kernels.cpu.attention import route
from sensorium.kernels.cpu.attention.tiles import causal as causal_tiles
from sensorium.kernels.cpu.attention.tiles import varlen as varlen_tiles
from sensorium.kernels.cpu.linear import onednn, table
from sensorium.processes.start import child_environment


def run(code: str, **environment: str) -> str:
    """Output of a fresh interpreter."""
    return run_in(None, code, **environment).stdout.strip()


def run_in(folder: Path | None, code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A fresh interpreter that has worked, in some folder."""
    source = str(Path(__file__).parents[2] / "src")
    env = {**os.environ, "PYTHONPATH": source, **environment}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env=env,
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done


NORM = """
    import torch
    from sensorium.kernels import ops
    from sensorium.kernels.cpu.compiler.cache import cache_folder
    x = torch.ones(2, 5)
    print(cache_folder() is not None, ops.rms_norm(x, torch.ones(5), 0.0).sum().item())
"""


@pytest.mark.slow
def test_without_a_writable_cache_folder_kernels_still_work(tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("")
    assert run(NORM, XDG_CACHE_HOME=str(blocked)) == "False 10.0"


FOLDER = """
    from sensorium.kernels.cpu.compiler.cache import cache_folder
    for _ in range(3):
        print(cache_folder())
"""


@pytest.mark.parametrize("where", ["a file", "no folder may be made", "relative", "no home"])
def test_a_cache_folder_that_cannot_be_written_is_told_once(tmp_path: Path, where: str) -> None:
    """The warning names the place, the reason, the cost and the variable that helps."""
    (tmp_path / "file").write_text("")
    environment = {
        "a file": {"XDG_CACHE_HOME": str(tmp_path / "file")},
        "no folder may be made": {"XDG_CACHE_HOME": "/proc"},
        "relative": {"XDG_CACHE_HOME": "somewhere"},
        "no home": {"HOME": "~", "XDG_CACHE_HOME": ""},  # what "~" stays for an unknown user
    }[where]
    done = run_in(tmp_path, FOLDER, **environment)
    assert done.stdout.split() == ["None"] * 3
    assert done.stderr.count("set XDG_CACHE_HOME") == 1
    assert "every start compiles them again" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["file"], "nothing is written elsewhere"


@pytest.mark.slow
def test_a_full_disk_is_told_once_and_kernels_still_work(tmp_path: Path) -> None:
    full = """
        import resource
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
        import torch
        from sensorium.kernels import ops
        for kind in (torch.float32, torch.bfloat16):
            ones = torch.ones(2, 5, dtype=kind), torch.ones(5, dtype=kind)
            print(ops.rms_norm(*ones, 0.0).sum().item())
    """
    done = run_in(None, full, XDG_CACHE_HOME=str(tmp_path))
    assert done.stdout.split() == ["10.0", "10.0"]
    assert done.stderr.count("set XDG_CACHE_HOME") == 1


@pytest.mark.slow
def test_kernels_are_kept_found_again_and_replaced_where_damaged(tmp_path: Path) -> None:
    assert run(NORM, XDG_CACHE_HOME=str(tmp_path)) == "True 10.0"
    kept = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.nb?")}
    assert len(kept) == 2  # an index and the code of one kernel
    assert run(NORM, XDG_CACHE_HOME=str(tmp_path)) == "True 10.0"
    assert kept == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.nb?")}
    for path in kept:
        path.write_bytes(b"damaged")
    assert run(NORM, XDG_CACHE_HOME=str(tmp_path)) == "True 10.0"


def test_every_thread_count_gives_the_same_norms():
    x, weight = torch.randn(300, 64), torch.rand(64)
    before = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            results.append(ops.rms_norm(x, weight, 1e-6))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(results[0], other) for other in results[1:])


def test_without_openmp_kernels_run_on_one_thread():
    compiled = elementwise.kernel(elementwise.build_norm, torch.float32)
    launcher = launch.Launcher(compiled.address, None)
    x, out, weight = torch.ones(4, 6), torch.zeros(4, 6), torch.full((6,), 2.0)
    for way in (launcher.parallel, launcher.released):
        out.zero_()
        values = (x.data_ptr(), 0, weight.data_ptr(), out.data_ptr(), 6, launch.float_bits(0.0))
        way(launch.pack(4, *values))
        assert torch.equal(out, torch.full((4, 6), 2.0))


def entered(way: launch.Kernel) -> int:
    """Run a kernel without tasks; return how many threads have entered it."""
    args = launch.pack(0, *[0] * 8)
    way(args)
    return args[0]


def test_no_more_threads_run_than_have_scratch() -> None:
    """Each thread looks for a task once; the number of threads may have grown since a plan."""
    compiled = elementwise.kernel(elementwise.build_norm, torch.float32)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(6)
        if entered(compiled.parallel) != 6:
            pytest.skip("torch brings no OpenMP library whose threads the kernels use")
        large = launch.RELEASE_WEIGHT
        for weight in (launch.SERIAL_WEIGHT, large):
            assert entered(compiled.for_weight(weight)) == 6
            assert entered(compiled.for_weight(weight, 2)) == 2
            assert entered(compiled.for_weight(weight, 9)) == 6
            assert entered(compiled.on(3, weight)) == 3
        assert entered(compiled.for_weight(0, 4)) == entered(compiled.on(4, 0)) == 1
    finally:
        torch.set_num_threads(before)


def test_warm_up_covers_what_a_step_needs(monkeypatch):
    ops.warm_up(torch.float32)
    monkeypatch.setattr(elementwise, "compile_kernel", None)
    ops.silu_mul(torch.ones(1, 4))
    ops.argmax(torch.ones(1, 4))
    ops.rms_norm(torch.ones(1, 4), torch.ones(4), 1e-6)
    assert ops.warm_up(torch.float64) < 1  # no kernels, nothing to do


@pytest.mark.parametrize("encoders", [True, False])
def test_warm_up_compiles_for_encoders_where_there_are_some(monkeypatch, encoders):
    built = []
    monkeypatch.setattr(elementwise, "kernel", lambda build, dtype: built.append(build))
    ops.warm_up(torch.bfloat16, encoders=encoders)
    assert set(built).issuperset(ops.DECODER_KERNELS + ops.FLOAT_CACHE_KERNELS)
    assert (ops.ENCODER_KERNELS[0] in built) == encoders
    assert (ops.VARLEN_KERNELS[0] in built) == encoders


@pytest.mark.parametrize("int8_cache", [True, False])
def test_warm_up_compiles_attention_for_the_one_cache_that_there_is(monkeypatch, int8_cache):
    built, compared = [], []
    monkeypatch.setattr(elementwise, "kernel", lambda build, dtype: built.append(build))
    monkeypatch.setattr(route, "choose", lambda *own: compared.append(own))
    monkeypatch.setattr(amx, "unit", lambda: amx.INSTRUCTIONS)
    monkeypatch.setattr(table, "warm_up", lambda dtype: None)
    monkeypatch.setattr(varlen_tiles, "trusted_unit", lambda: None)
    ops.warm_up(torch.bfloat16, int8_cache=int8_cache)
    assert set(built).issuperset(ops.DECODER_KERNELS + ops.ENCODER_KERNELS)
    tiles = {amx.bound(causal_tiles.build_attend, amx.INSTRUCTIONS)}
    floats, integers = tiles | {*ops.FLOAT_CACHE_KERNELS}, {*ops.INT8_CACHE_KERNELS}
    used, idle = (integers, floats) if int8_cache else (floats, integers)
    assert used <= set(built)
    assert idle.isdisjoint(built)
    assert amx.bound(varlen_tiles.build_attend, amx.INSTRUCTIONS) in built
    assert bool(compared) != int8_cache


def test_waiting_policy_is_set_before_torch_only_where_the_user_has_none():
    code = """
        import os
        from sensorium.kernels.cpu import threads
        print(threads.prepare(), os.environ["GOMP_SPINCOUNT"], threads.configure(1).number)
        import torch
        print(torch.get_num_threads(), threads.prepare())
    """
    assert run(code, GOMP_SPINCOUNT="77") == "True 77 1\n1 False"
    unset = "import os; os.environ.pop('GOMP_SPINCOUNT', None)\n" + textwrap.dedent(code)
    assert run(unset) == "True 10000 1\n1 False"


def test_tunables_of_child_processes_are_added_to_the_users():
    code = """
        import os
        from sensorium.kernels.cpu import threads
        threads.prepare()
        print(os.environ["GLIBC_TUNABLES"])
    """
    assert run(code, GLIBC_TUNABLES="") == "glibc.malloc.hugetlb=1"
    ours = "glibc.malloc.top_pad=1:glibc.malloc.hugetlb=1"
    assert run(code, GLIBC_TUNABLES="glibc.malloc.top_pad=1") == ours
    assert run(code, GLIBC_TUNABLES="glibc.malloc.hugetlb=0") == "glibc.malloc.hugetlb=0"


@pytest.mark.parametrize("name", ["ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"])
def test_few_shapes_are_kept_unless_the_user_says_how_many(name: str) -> None:
    code = f"""
        import os
        from sensorium.kernels.cpu import threads
        threads.prepare()
        print(os.environ["{name}"])
    """
    assert run(code, **{name: "77"}) == "77"
    unset = f"import os; os.environ.pop('{name}', None)\n" + textwrap.dedent(code)
    assert run(unset) == str(threads.KEPT_PRIMITIVES)


@pytest.mark.skipif(not onednn.packs(torch.float32), reason="this torch packs no weights")
def test_products_of_ever_new_numbers_of_rows_take_no_more_memory() -> None:
    code = """
        import ctypes, os
        for name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
            os.environ.pop(name, None)
        from sensorium.kernels.cpu import threads
        threads.configure(1)
        import psutil, torch
        from sensorium.kernels.cpu.linear import onednn
        multiply = onednn.pack_weight(torch.randn(64, 64)).bind()
        rows, sizes = torch.randn(600, 64), []
        for counts in (range(1, 300), range(300, 600)):
            for count in counts:
                multiply(rows[:count])
            ctypes.CDLL(None).malloc_trim(0)
            sizes.append(psutil.Process().memory_full_info().uss)
        print((sizes[1] - sizes[0]) >> 20)
    """
    assert int(run(code)) < 16, "MiB, of some 150 that all shapes would take"


COMPARE = """
import sys
import torch
from sensorium.kernels import ops, reference
from sensorium.kernels.batch import KVCacheLayout
from tests.kernels.batches import TOLERANCE, make_batch, twin
dtypes = [getattr(torch, name) for name in sys.argv[1:]]
for dtype in dtypes:
    tolerance = TOLERANCE[dtype]
    batch = make_batch(KVCacheLayout(1, 2, 64, 32, dtype), [(100, 1), (300, 9)])
    expected = twin(batch)
    qkv = torch.randn(10, (6 + 4) * 64).to(dtype)
    mixed = ops.rope_attention(qkv, batch, 0, 6, 2, 64, 0.125)
    plain = reference.rope_attention(qkv, expected, 0, 6, 2, 64, 0.125)
    torch.testing.assert_close(mixed, plain, rtol=tolerance, atol=tolerance)
"""


@pytest.mark.slow
def test_kernels_that_several_processes_compiled_do_not_mix_in_one(tmp_path: Path) -> None:
    """Each dtype compiled by a process of its own, in which functions get the same numbers.

    A third loads both.
    """
    environment = child_environment() | {"XDG_CACHE_HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] += os.pathsep + str(Path(__file__).parents[2])

    def run(code: str, *arguments: str) -> None:
        command = [sys.executable, "-c", code, *arguments]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]

    names = ("float32", "bfloat16")
    for name in names:
        run(COMPARE, name)
    run(COMPARE, *names)
