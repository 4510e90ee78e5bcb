"""Processors of laptops, servers and containers, from the files of emulated systems."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sensorium.processes import cores
from sensorium.processes.cgroups import cpu_quota, group_folders
from tests.processes.machines import add_cores, add_node, add_v1, add_v2, write

SOURCES = Path(__file__).parents[2] / "src" / "sensorium"


def threads(root: Path, num_cpus: int) -> int:
    return cores.find(root, range(num_cpus)).engine_threads().number


def test_this_machine() -> None:
    found = cores.find()
    assert found.allowed == os.sched_getaffinity(0)
    assert frozenset().union(*found.physical) == found.allowed
    assert 1 <= found.engine_threads().number <= len(found.allowed)


def test_without_any_file_each_cpu_is_a_core(tmp_path: Path) -> None:
    found = cores.find(tmp_path, range(6))
    assert (len(found.physical), found.slow, len(found.nodes), found.quota) == (6, set(), 1, None)
    assert found.engine_threads() == cores.EngineThreads(6, None, "physical cores")
    assert found.num_usable == 6


@pytest.mark.parametrize("name", ["core_cpus_list", "thread_siblings_list"])
def test_a_laptop_with_two_threads_per_core(tmp_path: Path, name: str) -> None:
    add_cores(tmp_path, [(i, i + 4) for i in range(4)], name=name)
    found = cores.find(tmp_path, range(8))
    assert found.engine_threads().number == 4
    assert found.num_usable == 8
    # One thread each of two cores, and both of a third.
    assert cores.find(tmp_path, [0, 1, 2, 6]).engine_threads().number == 3


def test_a_hybrid_laptop_of_intel(tmp_path: Path) -> None:
    """Six performance cores with two threads each, eight efficiency cores."""
    add_cores(tmp_path, [(2 * i, 2 * i + 1) for i in range(6)])
    add_cores(tmp_path, [(12 + i,) for i in range(8)])
    write(tmp_path, "sys/devices/cpu_core/cpus", "0-11")
    write(tmp_path, "sys/devices/cpu_atom/cpus", "12-19")
    chosen = cores.find(tmp_path, range(20)).engine_threads()
    assert (chosen.number, chosen.reason) == (6, "performance cores")
    assert cores.find(tmp_path, range(20)).num_usable == 20
    # Kept to efficiency cores alone, those are the cores.
    assert cores.find(tmp_path, range(12, 20)).engine_threads().number == 8


def test_capacities_of_arm(tmp_path: Path) -> None:
    """Two fast cores, three of the middle, three slow ones; one says nothing."""
    for cpu, capacity in enumerate((250, 250, 250, 870, 870, 870, 1024, 1024)):
        write(tmp_path, f"sys/devices/system/cpu/cpu{cpu}/cpu_capacity", capacity)
    assert cores.find(tmp_path, range(8)).slow == {0, 1, 2}
    assert threads(tmp_path, 8) == 5
    assert threads(tmp_path, 9) == 6
    assert threads(tmp_path, 3) == 3


def add_server(root: Path, per_socket: int = 64) -> None:
    """Two sockets with two threads per core, numbered as Linux does."""
    for socket in range(2):
        start = socket * per_socket
        firsts = range(start, start + per_socket)
        add_cores(root, [(i, i + 2 * per_socket) for i in firsts], socket=socket)
        second = start + 2 * per_socket
        add_node(
            root, socket, f"{start}-{start + per_socket - 1},{second}-{second + per_socket - 1}"
        )


def test_a_server_of_two_sockets_keeps_to_one(tmp_path: Path) -> None:
    add_server(tmp_path)
    found = cores.find(tmp_path, range(256))
    chosen = found.engine_threads()
    assert chosen.number == 64
    assert chosen.cpus == {*range(64), *range(128, 192)}
    assert chosen.reason == "physical cores of one memory node of 2"
    assert cores.cpu_list(chosen.cpus) == "0-63,128-191"
    # What does not fit one node gets all of them; what does is kept there.
    assert found.engine_threads(100) == cores.EngineThreads(100, None, "as asked for")
    assert found.engine_threads(16).cpus == chosen.cpus
    # Bound to the second socket from outside, there is nothing more to choose.
    bound = cores.find(tmp_path, range(64, 128)).engine_threads()
    assert (bound.number, bound.cpus) == (64, None)


def test_a_few_cores_of_two_sockets_are_all_used(tmp_path: Path) -> None:
    add_server(tmp_path)
    chosen = cores.find(tmp_path, [0, 1, 2, 3, 64, 65, 66, 67]).engine_threads()
    assert (chosen.number, chosen.cpus) == (8, None)


def test_nodes_within_a_socket_are_one(tmp_path: Path) -> None:
    """Two sockets divided into four nodes each, and a node that is memory alone."""
    for node in range(8):
        add_cores(tmp_path, [(i,) for i in range(node * 12, node * 12 + 12)], socket=node // 4)
        add_node(tmp_path, node, f"{node * 12}-{node * 12 + 11}")
    add_node(tmp_path, 8, "")
    chosen = cores.find(tmp_path, range(96)).engine_threads()
    assert (chosen.number, chosen.cpus) == (48, set(range(48)))


def test_ranks_of_a_model_share_the_cores_node_by_node(tmp_path: Path) -> None:
    for node in range(2):
        add_cores(tmp_path, [(i, i + 16) for i in range(node * 8, node * 8 + 8)], socket=node)
        add_node(tmp_path, node, f"{node * 8}-{node * 8 + 7},{node * 8 + 16}-{node * 8 + 23}")
    found = cores.find(tmp_path, range(32))
    two = [found.rank_threads(rank, 2) for rank in range(2)]
    assert [each.number for each in two] == [8, 8]
    assert [each.cpus for each in two] == list(found.nodes)
    four = [found.rank_threads(rank, 4) for rank in range(4)]
    assert [each.number for each in four] == [4] * 4
    assert four[1].cpus == {*range(4, 8), *range(20, 24)}
    assert found.rank_threads(1, 2, asked=6).number == 3
    one = cores.find(tmp_path, range(1))
    assert [one.rank_threads(rank, 2).number for rank in range(2)] == [1, 1]


def test_a_virtual_machine_that_calls_each_cpu_a_socket(tmp_path: Path) -> None:
    for cpu in range(16):
        add_cores(tmp_path, [(cpu,)], socket=cpu)
    add_node(tmp_path, 0, "0-15")
    found = cores.find(tmp_path, range(16))
    assert found.nodes == (set(range(16)),)
    assert found.engine_threads().number == 16


def test_nodes_that_do_not_name_all_cpus_are_not_believed(tmp_path: Path) -> None:
    add_node(tmp_path, 0, "0-3")
    assert cores.find(tmp_path, range(16)).nodes == (set(range(16)),)


def test_no_machine_has_more_threads_than_the_bound(tmp_path: Path) -> None:
    chosen = cores.find(tmp_path, range(1024)).engine_threads()
    assert chosen.number == cores.MOST_THREADS
    assert "most by default" in chosen.reason


# --- containers ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("quota", "expected", "number"),
    [
        ("max 100000", None, 8),
        ("149000 100000", 1.49, 1),
        ("150000 100000", 1.5, 2),
        ("300000 100000", 3.0, 3),
        ("50000 100000", 0.5, 1),
        ("1600000 100000", 16.0, 8),
        ("20000 10000", 2.0, 2),
    ],
)
def test_quota_of_a_container(
    tmp_path: Path, quota: str, expected: float | None, number: int
) -> None:
    add_v2(tmp_path, "/", **{"": quota})
    found = cores.find(tmp_path, range(8))
    assert found.quota == expected
    assert found.engine_threads().number == number
    assert found.num_usable == number


def test_the_least_quota_of_all_levels_counts(tmp_path: Path) -> None:
    """As in pods: the pod has more than its container, or less."""
    add_v2(tmp_path, "/pods/pod/app", pods="max 100000", pods_pod="250000 100000",
           pods_pod_app="400000 100000")  # fmt: skip
    assert cpu_quota(tmp_path) == 2.5
    write(tmp_path, "sys/fs/cgroup/pods/pod/app/cpu.max", "120000 100000")
    assert cpu_quota(tmp_path) == 1.2


@pytest.mark.parametrize(
    ("group", "inner"),
    [("/docker/abc", "/docker/abc"), ("/docker/abc/app", "/docker/abc"), ("/docker/xyz", "/")],
    ids=["whole", "below", "not shown"],
)
def test_groups_that_are_mounted_as_the_root(tmp_path: Path, group: str, inner: str) -> None:
    """Of version 1 a container sees its own group where the root would be."""
    add_v1(tmp_path, group, inner=inner, **{"": (150000, 100000)})
    assert cpu_quota(tmp_path) == 1.5


def test_version_1_with_levels(tmp_path: Path) -> None:
    add_v1(tmp_path, "/a/b", a=(300000, 100000), a_b=(-1, 100000))
    assert cpu_quota(tmp_path) == 3.0
    folder = tmp_path / "sys/fs/cgroup/cpu,cpuacct"
    assert group_folders("cpu", tmp_path) == [folder / "a" / "b", folder / "a", folder]
    assert group_folders("pids", tmp_path) == []


def test_a_group_outside_of_the_namespace(tmp_path: Path) -> None:
    add_v2(tmp_path, "/../sibling", **{"": "200000 100000"})
    assert cpu_quota(tmp_path) == 2.0


def test_a_mount_point_with_a_space(tmp_path: Path) -> None:
    write(tmp_path, "proc/self/cgroup", "0::/")
    line = "30 23 0:26 / /my\\040groups rw - cgroup2 cgroup2 rw"
    write(tmp_path, "proc/self/mountinfo", line)
    write(tmp_path, "my groups/cpu.max", "700000 100000")
    assert cpu_quota(tmp_path) == 7.0


def test_a_cpuset_of_three(tmp_path: Path) -> None:
    """A cpuset shows as affinity; both threads of one core, and one of another."""
    add_cores(tmp_path, [(i, i + 8) for i in range(8)])
    found = cores.find(tmp_path, [2, 3, 10])
    assert (found.num_usable, found.engine_threads().number) == (3, 2)


JUNK = (
    "",
    "max",
    "-1",
    "0 0",
    "abc",
    "1 2 3",
    "nan nan",
    "9" * 400,
    "0-",
    "5-2",
    ",",
    "0-99999999999",
)


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_damaged_files_never_fail(tmp_path: Path, data: st.DataObject) -> None:
    paths = [
        "proc/self/cgroup", "proc/self/mountinfo", "sys/fs/cgroup/cpu.max",
        "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us", "sys/devices/cpu_core/cpus",
        "sys/devices/system/node/node0/cpulist", "sys/devices/system/node/node1/cpulist",
        *(f"sys/devices/system/cpu/cpu{i}/cpu_capacity" for i in range(3)),
        *(f"sys/devices/system/cpu/cpu{i}/topology/core_cpus_list" for i in range(3)),
        *(f"sys/devices/system/cpu/cpu{i}/topology/physical_package_id" for i in range(3)),
    ]  # fmt: skip
    root = Path(tempfile.mkdtemp(dir=tmp_path))  # one for each example: what was found is kept
    add_v2(root, "/")
    for path in data.draw(st.lists(st.sampled_from(paths), unique=True)):
        write(root, path, data.draw(st.sampled_from(JUNK)))
    found = cores.find(root, range(4))
    assert 1 <= found.engine_threads().number <= 4
    assert 1 <= found.num_usable <= 4
    assert sorted(cpu for core in found.physical for cpu in core) == [0, 1, 2, 3]


def test_a_file_that_is_no_text(tmp_path: Path) -> None:
    path = tmp_path / "sys/devices/cpu_core/cpus"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"\xff\xfe\x00")
    assert threads(tmp_path, 4) == 4


def test_one_cpu_of_this_machine() -> None:
    """As ``taskset`` leaves it."""
    cpu = min(os.sched_getaffinity(0))
    code = (
        f"import os; os.sched_setaffinity(0, [{cpu}]); from sensorium.processes import cores; "
        "print(cores.find().engine_threads().number, cores.find().num_usable)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True,
        env=os.environ | {"PYTHONPATH": str(SOURCES.parent)},
    )  # fmt: skip
    assert done.stdout.split() == ["1", "1"]


def test_nothing_else_counts_processors() -> None:
    """A count of the system's CPUs is wrong in containers, and there are too many of those."""
    counts = {"sched_getaffinity", "cpu_count", "process_cpu_count", "SC_NPROCESSORS_ONLN"}
    told = {SOURCES / "cli" / "commands" / "info.py", SOURCES / "cli" / "doctor" / "machine.py"}
    allowed = {SOURCES / "processes" / "cores.py", *told}
    for path in set(SOURCES.rglob("*.py")) - allowed:
        for node in ast.walk(ast.parse(path.read_text())):
            name = getattr(node, "attr", None) or getattr(node, "id", None)
            value = node.value if isinstance(node, ast.Constant) else None
            assert not {name, value if isinstance(value, str) else None} & counts, path
