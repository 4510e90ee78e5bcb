"""Each check of sensorium doctor, on machines that files describe."""

from __future__ import annotations

import importlib
import os
import resource
import socket
import stat
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

from sensorium.cli.doctor import machine, running, software, storage
from sensorium.cli.doctor.finding import LEVELS, Finding
from tests.processes.machines import add_cores, add_node, add_v2, write


def levels(findings: Iterable[Finding]) -> dict[str, str]:
    """Return the worst level by check; a finding that needs an action says which."""
    found: dict[str, str] = {}
    for finding in findings:
        assert finding.advice or finding.level in ("ok", "note"), finding
        worse = max(finding.level, found.get(finding.check, "ok"), key=LEVELS.index)
        found[finding.check] = worse
    return found


def test_cores_affinity_and_quota(tmp_path: Path) -> None:
    allowed = sorted(os.sched_getaffinity(0))
    add_cores(tmp_path, [[cpu] for cpu in allowed])
    assert levels(machine.processors(tmp_path, len(allowed)))["cores"] in ("ok", "note")
    assert "affinity" not in levels(machine.processors(tmp_path, len(allowed)))
    found = list(machine.processors(tmp_path, len(allowed) + 6))
    assert levels(found)["affinity"] == "note"
    assert f"{len(allowed)} of {len(allowed) + 6} CPUs" in str(found)
    add_v2(tmp_path, "/a", a="50000 100000")
    fresh = tmp_path / "again"  # what is found is remembered by folder
    add_cores(fresh, [[cpu] for cpu in allowed])
    add_v2(fresh, "/a", a="50000 100000")
    found = list(machine.processors(fresh))
    assert levels(found)["quota"] == "warning"
    assert "0.5 CPUs" in str(found)
    add_node(fresh, 0, "0")


@pytest.mark.parametrize(("mean", "level"), [("0.01", "ok"), ("99.5", "warning")])
def test_load(mean: str, level: str, tmp_path: Path) -> None:
    assert levels(machine.load(tmp_path)) == {}
    write(tmp_path, "proc/loadavg", f"{mean} 0.5 0.5 1/200 1234")
    assert levels(machine.load(tmp_path)) == {"load": level}


@pytest.mark.parametrize(
    ("text", "level"),
    [
        ("always [madvise] never", "ok"),
        ("[always] madvise never", "ok"),
        ("always madvise [never]", "warning"),
        ("nonsense", "warning"),
        (None, "note"),
    ],
)
def test_huge_pages(text: str | None, level: str, tmp_path: Path) -> None:
    if text is not None:
        write(tmp_path, "sys/kernel/mm/transparent_hugepage/enabled", text)
    assert levels(machine.huge_pages(tmp_path)) == {"huge pages": level}


def add_memory(root: Path, total: int, free: int, swapped: int = 0) -> None:
    """Describe memory, in GiB."""
    lines = {"MemTotal": total, "MemAvailable": free, "SwapTotal": 8, "SwapFree": 8 - swapped}
    write(root, "proc/meminfo", "\n".join(f"{k}: {v << 20} kB" for k, v in lines.items()))


def test_memory(tmp_path: Path) -> None:
    add_memory(tmp_path, 64, 60)
    write(tmp_path, "proc/sys/vm/overcommit_memory", 0)
    assert levels(machine.memory(tmp_path)) == {"memory": "ok"}
    add_memory(tmp_path, 64, 1, swapped=2)
    write(tmp_path, "proc/sys/vm/overcommit_memory", 2)
    found = levels(machine.memory(tmp_path))
    assert found == {"memory": "warning", "swap": "warning", "overcommit": "warning"}


def test_the_limit_of_a_control_group_counts(tmp_path: Path) -> None:
    add_memory(tmp_path, 64, 60)
    add_v2(tmp_path, "/a", a="max 100000")
    write(tmp_path, "sys/fs/cgroup/a/memory.max", 4 << 30)
    write(tmp_path, "sys/fs/cgroup/a/memory.current", 3 << 30)
    [finding] = machine.memory(tmp_path)
    assert finding.level == "warning"
    assert finding.facts == "4.0 GiB, 1.0 GiB free, by the limit of the control group"
    write(tmp_path, "sys/fs/cgroup/a/pids.max", 100)
    assert levels(machine.limits(tmp_path))["processes"] == "warning"


@pytest.fixture
def few_files() -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (1000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_open_files(few_files: None, tmp_path: Path) -> None:
    assert levels(machine.limits(tmp_path))["open files"] == "warning"


@pytest.mark.parametrize(
    ("kind", "flags", "level"),
    [
        ("x86_64", "sse4_2", "problem"),
        ("x86_64", "sse4_2 avx2", "note"),
        ("x86_64", "avx2 avx512f avx512_bf16", "ok"),
        ("aarch64", "", "note"),
    ],
)
def test_instructions(kind: str, flags: str, level: str) -> None:
    found = machine.architecture(kind, frozenset(flags.split()))
    assert levels(found) == {"instructions": level}


def test_flags_of_the_processor(tmp_path: Path) -> None:
    assert machine.cpu_flags(tmp_path) == frozenset()
    write(tmp_path, "proc/cpuinfo", "processor : 0\nflags\t\t: fpu avx2\n\nprocessor : 1")
    assert machine.cpu_flags(tmp_path) == {"fpu", "avx2"}


def test_variables_of_threads() -> None:
    assert levels(machine.threads({})) == {}
    found = machine.threads({"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "ACTIVE"})
    assert levels(found) == {"threads": "warning"}


def test_folders(tmp_path: Path) -> None:
    assert levels(storage.shared_memory(tmp_path / "none")) == {str(tmp_path / "none"): "warning"}
    assert levels(storage.temporary(tmp_path)) in (
        {"temporary folder": "ok"},
        {"temporary folder": "warning"},
    )
    assert levels(storage.temporary(tmp_path / "none")) == {"temporary folder": "problem"}
    (tmp_path / "file").touch()
    for variables in ({"XDG_CACHE_HOME": "relative"}, {"XDG_CACHE_HOME": str(tmp_path / "file")}):
        assert levels(storage.kernel_cache(variables)) == {"kernel cache": "problem"}
    assert levels(storage.kernel_cache({"XDG_CACHE_HOME": str(tmp_path)}))["kernel cache"] != (
        "problem"
    )
    assert levels(storage.downloads({"HF_HOME": str(tmp_path / "file")})) == {
        "downloads": "problem"
    }
    found = list(storage.downloads({"HF_HUB_CACHE": str(tmp_path / "a"), "HF_HUB_OFFLINE": "1"}))
    assert str(tmp_path / "a") in found[0].facts
    assert found[1].level == "note"
    assert not (tmp_path / "a").exists(), "nothing is made"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_may_not_be_written(tmp_path: Path) -> None:
    tmp_path.chmod(stat.S_IRUSR | stat.S_IXUSR)
    assert levels(storage.kernel_cache({"XDG_CACHE_HOME": str(tmp_path)})) == {
        "kernel cache": "problem"
    }


def test_versions_of_packages() -> None:
    assert levels(software.packages()) == {"packages": "ok"}
    wanted = ["numpy>=99", "no-such-package>=1", "numba>=0.1", "pytest>=99; extra == 'test'"]
    found = list(software.packages(wanted))
    assert [finding.level for finding in found[:3]] == ["problem", "problem", "ok"]
    assert "pip install 'numpy>=99'" in found[0].advice
    assert "no-such-package is not installed" in found[1].facts
    assert "1 packages" in found[2].facts


def test_a_package_that_was_built_for_another_torch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    info = tmp_path / "torchvision-0.1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: torchvision\nVersion: 0.1\nRequires-Dist: torch==1.0.0\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    importlib.invalidate_caches()
    found = list(software.packages([]))
    assert levels(found) == {"packages": "problem"}
    assert "torchvision 0.1 was built for torch==1.0.0" in str(found)


def test_a_library_that_cannot_be_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken_library.py").write_text("raise ImportError('libx.so.1: not found')")
    (tmp_path / "fatal_library.py").write_text("import os; os.abort()")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    found = list(software.libraries(("json", "broken_library", "fatal_library")))
    assert [finding.level for finding in found] == ["problem", "problem"]
    assert "libx.so.1: not found" in found[0].facts


def test_environment() -> None:
    assert set(levels(software.environment({})).values()) == {"ok"}
    variables = {"VLLM_USE_V1": "1", "LD_PRELOAD": "/usr/lib/libiomp5.so"}
    found = list(software.environment(variables))
    assert "VLLM_USE_V1" in str(found)
    assert levels(found)["environment"] == "warning"


def test_ports() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        number = taken.getsockname()[1]
        assert levels(running.port("127.0.0.1", number)) == {"port": "warning"}
    assert levels(running.port("127.0.0.1", number)) == {"port": "ok"}
    assert levels(running.port("no.such.host.invalid", 1)) == {"port": "warning"}


def test_the_first_kernel() -> None:
    [finding, *rest] = running.first_kernel()
    assert finding.check == "first kernel"
    assert finding.level in ("ok", "warning")
    assert " s for the kernel" in finding.facts
    assert not rest, "torch's OpenMP library is there"


def test_a_first_kernel_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    from sensorium.kernels import ops

    def fail(x: object) -> None:
        raise RuntimeError("LLVM ERROR: no\nmore")

    monkeypatch.setattr(ops, "silu_mul", fail)
    [finding] = running.first_kernel()
    assert finding.level == "problem"
    assert "RuntimeError: LLVM ERROR: no" in finding.facts


def test_gpus_as_they_are() -> None:
    import torch

    found = list(software.gpus())
    if torch.cuda.is_available():
        assert len(found) == torch.cuda.device_count()
    else:
        assert len(found) == 1


def test_a_driver_that_torch_cannot_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("torch can use the driver of this machine")
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!{sys.executable}\nprint('570.1.2')\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    [finding] = software.gpus()
    assert "570.1.2" in finding.facts
    assert finding.level == ("warning" if torch.version.cuda is None else "problem")
    assert finding.advice
