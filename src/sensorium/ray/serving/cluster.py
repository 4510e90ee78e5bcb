"""The Ray cluster that replicas run on: one that there is, or one of our own on this machine."""

from __future__ import annotations

import contextlib
import logging
import math
import shutil
import signal
import tempfile
from collections.abc import Iterator
from typing import Any

import ray

from sensorium.config import ServedConfig
from sensorium.errors import ConfigError
from sensorium.processes import cores
from sensorium.processes.limits import available_memory
from sensorium.processes.start import interrupts_held
from sensorium.ray.serving.app import Resources

logger = logging.getLogger("sensorium.server")

STORE_PART, LEAST_STORE, MOST_STORE = 0.05, 128 << 20, 2 << 30
"""Part of the available memory that the object store of a cluster of our own may take, and bounds
of it in bytes."""
_LONGEST_FOLDER = 40
"""Characters of a folder in which Ray still can make its sockets."""
NAMESPACE = "serve"


@contextlib.contextmanager
def cluster(address: str | None, config: ServedConfig) -> Iterator[Resources]:
    """Connect to a cluster, or start one on this machine that ends with the block.

    Gives what each process may reserve. Raises ConfigError when the cluster cannot be reached, or
    has not enough processors.
    """
    if address is None:
        with _own(config) as resources:
            yield resources
        return
    logger.info("connecting to Ray at %s", address)
    try:
        ray.init(address=address, namespace=NAMESPACE, **_SILENT)
    except Exception as error:  # Ray raises many kinds, all of which mean the same here
        raise ConfigError(
            f"Ray cannot be reached at {address!r}: {_first_line(error)}", param="ray_address"
        ) from error
    try:
        resources = _found_resources(config)
        yield resources
    finally:
        ray.shutdown()


_SILENT: dict[str, Any] = {"configure_logging": False, "logging_level": logging.ERROR}


@contextlib.contextmanager
def _own(config: ServedConfig) -> Iterator[Resources]:
    most = most_replicas(config)
    usable = cores.find().num_usable
    each = max(1, usable // most)
    if most > usable:
        logger.warning("%d replicas share %d processors", most, usable)
    server = config.server.api_server_count
    folder = tempfile.mkdtemp(prefix="sensorium-ray-", dir=_short_folder())
    logger.info("starting Ray on this machine, for %d replicas", most)
    try:
        with _starting():
            ray.init(
                address="local",
                num_cpus=each * most + server,
                object_store_memory=_store_bytes(),
                include_dashboard=False,
                namespace=NAMESPACE,
                _node_ip_address="127.0.0.1",
                _temp_dir=folder,
                **_SILENT,
            )
        yield Resources(engine_cpus=each, engine_gpus=_gpus(config), per_node=most)
    finally:
        ray.shutdown()
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _starting() -> Iterator[None]:
    """Keep Ctrl-C from Ray's processes, which inherit what is blocked, but let them be ended."""
    with interrupts_held():
        held = signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
        try:
            yield
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, held)


def most_replicas(config: ServedConfig) -> int:
    """Return the most engines that may run at a time."""
    span = config.server.replica_range
    return span[1] if span is not None else config.engine.parallel.data_parallel_size


def _found_resources(config: ServedConfig) -> Resources:
    """Return what each process reserves on a cluster that there is. Raises ConfigError."""
    found = ray.cluster_resources()
    nodes = [node["Resources"].get("CPU", 0) for node in ray.nodes() if node["Alive"]]
    span = config.server.replica_range
    least = span[0] if span is not None else config.engine.parallel.data_parallel_size
    gpus = _gpus(config)
    if gpus > 0 and found.get("GPU", 0) < least:
        raise ConfigError(
            f"The Ray cluster has {found.get('GPU', 0):g} GPUs, fewer than the {least} replicas.",
            param="data_parallel_size",
        )
    per_node = 1 if gpus else max(1, math.ceil(least / max(1, len(nodes))))
    spare = config.server.api_server_count
    each = max(1, int((min(nodes, default=0) - spare) // per_node)) if nodes else 1
    need, there = least * each + spare, found.get("CPU", 0)
    if need > there:
        raise ConfigError(
            f"The Ray cluster has {there:g} CPUs; {least} replicas and {spare} processes for HTTP "
            f"need {need}.",
            param="data_parallel_size",
        )
    return Resources(engine_cpus=each, engine_gpus=gpus, per_node=per_node)


def _gpus(config: ServedConfig) -> float:
    if config.engine.model.device == "cpu" or not ray.cluster_resources().get("GPU", 0):
        return 0
    return 1


def _store_bytes() -> int:
    return min(MOST_STORE, max(LEAST_STORE, int(available_memory() * STORE_PART)))


def _short_folder() -> str:
    folder = tempfile.gettempdir()
    return folder if len(folder) <= _LONGEST_FOLDER else "/tmp"


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__
