"""Connection to Ray: a cluster that runs already, or one of this program's own on this machine.

A cluster of its own listens on 127.0.0.1 alone, asks for a token, reports nothing to anybody, has
no dashboard, and ends with the context that started it, or with the program if that is killed.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import logging
import os
import secrets
import shutil
import signal
import socket
import tempfile
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sensorium import environment
from sensorium.errors import ConfigError, UnavailableError
from sensorium.processes import cores
from sensorium.processes.private_folder import PrivateFolder

NEEDS_RAY = 'Ray is not installed. Install it with: pip install "sensorium[ray]"'
MOST_OBJECT_BYTES = 1 << 30
"""Most memory of a cluster of one's own for objects that its processes share, by default."""
LEAST_OBJECT_BYTES = 80 << 20
"""Ray refuses less than 75 MiB."""

_CONNECT_SECONDS = 10.0
_PREFIX = "sensorium-ray-"
_LONGEST_FOLDER = 40
"""Characters of a folder below which the names of Ray's sockets fit the system's limit of 107."""
_SHARED_MEMORY = Path("/dev/shm")
_LOOPBACK_ONLY = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
"""Variable by which Ray's processes bind to the loopback address, on Linux as well, if it is 0."""


def require_ray() -> None:
    """Raise ConfigError, which says what to install, where Ray is missing."""
    if importlib.util.find_spec("ray") is None:
        raise ConfigError(NEEDS_RAY)


@contextlib.contextmanager
def ray_cluster(
    address: str | None = None,
    *,
    num_cpus: int | None = None,
    object_store_bytes: int | None = None,
    namespace: str | None = None,
    show_logs: bool = False,
) -> Iterator[None]:
    """Connect this process to Ray for the block; leave a connection that there is as it is.

    Args:
        address: ``auto`` for the cluster that runs on this machine or that ``RAY_ADDRESS`` names,
            ``HOST:PORT`` for another one; None for a cluster of one's own, see ``local_cluster``.
        num_cpus: CPUs that a cluster of one's own has to give.
        object_store_bytes: Its memory for objects.
        namespace: Names of actors are looked up in here; one that nobody else has if None.
        show_logs: Write what tasks and actors log to this program's error stream.

    Raises:
        ConfigError: Ray is not installed, or cannot be started, or the address makes no sense.
        UnavailableError: Nothing answers at the address.
    """
    require_ray()
    import ray

    if ray.is_initialized():
        yield
    elif address is None:
        options: dict[str, Any] = {"num_cpus": num_cpus, "object_store_bytes": object_store_bytes}
        with local_cluster(**options, namespace=namespace, show_logs=show_logs):
            yield
    else:
        with _connection(address, namespace, show_logs):
            yield


@contextlib.contextmanager
def local_cluster(
    *,
    num_cpus: int | None = None,
    object_store_bytes: int | None = None,
    namespace: str | None = None,
    show_logs: bool = False,
) -> Iterator[str]:
    """Run a cluster on this machine for the block, and connect this process to it.

    Its processes have the environment of this one. It has a folder of its own, so that programs
    that look for a running cluster do not find it; who has the address that is given, and the
    environment, can join it.

    Args:
        num_cpus: CPUs that tasks and actors may take; those that this process may use if None.
        object_store_bytes: Memory for objects; by default a quarter of the shared memory, 1 GiB at
            most. What is beyond goes to the disk.
        namespace: As in ``ray_cluster``.
        show_logs: As in ``ray_cluster``.

    Raises:
        ConfigError: Ray is not installed or cannot be started.
    """
    require_ray()
    quiet()
    folder = PrivateFolder(_short_folder(), _PREFIX)
    try:
        with _own_environment():
            with _process_kept():
                _bind_to_loopback(True)
                node = _start(
                    show_logs,
                    address="local",
                    namespace=namespace,
                    num_cpus=num_cpus or cores.find().num_usable,
                    object_store_memory=_object_bytes(object_store_bytes),
                    include_dashboard=False,
                    _temp_dir=str(folder.path),
                )
            try:
                yield str(node.address_info["gcs_address"])
            finally:
                _stop()
    finally:
        folder.close()


@contextlib.contextmanager
def _connection(address: str, namespace: str | None, show_logs: bool) -> Iterator[None]:
    """Connect to a cluster that runs. Raises ConfigError, UnavailableError."""
    with _process_kept():
        _start(show_logs, address=found_address(address), namespace=namespace)
    try:
        yield
    finally:
        _stop()


def found_address(address: str) -> str:
    """Return HOST:PORT of a cluster that listens: of ``auto`` the one that Ray finds.

    Ray itself would try to connect for minutes. Raises ConfigError, UnavailableError.
    """
    if "://" in address:
        raise ConfigError(
            f"The address of Ray must be 'auto' or HOST:PORT, got {address!r}. Ray's client "
            "(ray://) is not supported: run the command on a machine of the cluster.",
            param="ray_address",
        )
    quiet()
    from ray._private.services import canonicalize_bootstrap_address

    _bind_to_loopback(os.environ.get(_LOOPBACK_ONLY) == "0")
    try:
        found = canonicalize_bootstrap_address(address)
    except ConnectionError as error:
        raise UnavailableError(
            "No cluster of Ray runs on this machine, and RAY_ADDRESS names none: start one with "
            "`ray start --head`, or give its address."
        ) from error
    except (ValueError, OSError) as error:
        raise _no_address(address) from error
    host, _, port = (found or "").strip("[]").rpartition(":")
    if not (found and host and port.isascii() and port.isdigit() and int(port) < 1 << 16):
        raise _no_address(address)
    try:
        socket.create_connection((host.strip("[]"), int(port)), _CONNECT_SECONDS).close()
    except OSError as error:
        raise UnavailableError(f"No cluster of Ray answers at {found}: {error}.") from error
    return str(found)


def _no_address(address: str) -> ConfigError:
    return ConfigError(
        f"The address of Ray must be 'auto' or HOST:PORT, got {address!r}.", param="ray_address"
    )


def _start(show_logs: bool, **options: Any) -> Any:
    """Connect; return the context of Ray. Raises ConfigError, UnavailableError."""
    loud = environment.log_level() == "DEBUG"
    quiet()
    import ray

    try:
        with contextlib.nullcontext() if loud else _no_standard_error():
            return ray.init(
                log_to_driver=loud or show_logs,
                logging_level=logging.INFO if loud else logging.ERROR,
                **options,
            )
    except ConnectionError as error:
        raise UnavailableError(f"Ray cannot be reached: {error}") from error
    except (RuntimeError, ValueError, OSError, TimeoutError) as error:
        _stop()
        raise ConfigError(f"Ray cannot be started: {error}") from error


@contextlib.contextmanager
def _no_standard_error() -> Iterator[None]:
    """Discard what Ray's library, which is no Python, says while it begins."""
    kept, nothing = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nothing)


def own_store_bytes() -> int:
    """Return the bytes of this machine's object store. The process is connected to Ray."""
    import ray

    own = ray.get_runtime_context().get_node_id()
    found = [node["Resources"] for node in ray.nodes() if node["NodeID"] == own]
    return int(sum(resources.get("object_store_memory", 0) for resources in found))


def quiet() -> None:
    """Keep Ray's libraries from writing to the terminal, except errors. Call it in a driver.

    Unless ``SENSORIUM_LOG_LEVEL`` is ``debug``.
    """
    if environment.log_level() == "DEBUG":
        return
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    warnings.filterwarnings("ignore", module=r"ray\.")
    for name in ("ray", "ray.data", "ray.serve"):
        logging.getLogger(name).setLevel(logging.ERROR)


def _stop() -> None:
    """Disconnect, and end what was started; wait until it has ended."""
    import ray

    with interrupts_ignored():
        ray.shutdown(wait_for_processes=True)


@contextlib.contextmanager
def interrupts_ignored() -> Iterator[None]:
    """Let no Ctrl-C come between the steps of ending a cluster, which take a second or two."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@contextlib.contextmanager
def _own_environment() -> Iterator[None]:
    """Give the variables of a cluster of one's own to it and to those who join it."""
    wanted = {"RAY_USAGE_STATS_ENABLED": "0", _LOOPBACK_ONLY: "0"}
    if not any(os.environ.get(name) for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")):
        wanted["RAY_AUTH_TOKEN"] = _token()
    before = {name: os.environ.get(name) for name in (*wanted, "RAY_AUTH_MODE")}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@functools.cache
def _token() -> str:
    """Return the secret of this process's clusters, which Ray remembers from the first one."""
    return secrets.token_hex(32)


def _bind_to_loopback(only: bool) -> None:
    """Tell Ray's library, which read the variable when it was imported."""
    from ray._private import ray_constants

    ray_constants.ENABLE_RAY_CLUSTER = not only


@contextlib.contextmanager
def _process_kept() -> Iterator[None]:
    """Keep what Ray changes of this process: its group, and what SIGTERM does.

    In a group of its own it would not get the Ctrl-C of a terminal.
    """
    group = os.getpgrp()
    in_main = threading.current_thread() is threading.main_thread()
    handler = signal.getsignal(signal.SIGTERM) if in_main else None
    try:
        yield
    finally:
        if os.getpgrp() != group:
            with contextlib.suppress(OSError):  # the group has ended
                os.setpgid(0, group)
        if in_main:
            signal.signal(signal.SIGTERM, handler)


def _short_folder() -> str:
    """Return a folder for temporary files whose name is short enough for sockets below it."""
    folder = tempfile.gettempdir()
    return folder if len(folder) <= _LONGEST_FOLDER - len(_PREFIX) else "/tmp"


def _object_bytes(asked: int | None) -> int:
    if asked is None:
        place = _SHARED_MEMORY if _SHARED_MEMORY.is_dir() else Path(tempfile.gettempdir())
        asked = min(MOST_OBJECT_BYTES, shutil.disk_usage(place).total // 4)
    return max(LEAST_OBJECT_BYTES, asked)
