"""Resources of replicas: on a cluster that there is, or on one of our own on this machine."""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Iterator

import ray

from sensorium.config import ServedConfig
from sensorium.errors import ConfigError
from sensorium.processes import cores
from sensorium.ray.cluster import ray_cluster
from sensorium.ray.serving.app import Resources

logger = logging.getLogger("sensorium.server")

NAMESPACE = "serve"


@contextlib.contextmanager
def connected(config: ServedConfig) -> Iterator[Resources]:
    """Connect to the cluster of ``--ray-address``, or run one of our own for the block.

    Gives what each process may reserve. Raises ConfigError when Ray cannot be used or the cluster
    has not enough processors, UnavailableError when nothing answers at the address.
    """
    address = config.server.ray_address
    if address is not None:
        logger.info("connecting to Ray at %s", address)
        with ray_cluster(address, namespace=NAMESPACE, show_logs=True):
            yield _found_resources(config)
        return
    most = most_replicas(config)
    usable = cores.find().num_usable
    if most > usable:
        logger.warning("%d replicas share %d processors", most, usable)
    each = max(config.engine.parallel.tensor_parallel_size, usable // most)
    num_cpus = each * most + config.server.api_server_count
    logger.info("starting Ray on this machine")
    with ray_cluster(num_cpus=num_cpus, namespace=NAMESPACE, show_logs=True):
        yield Resources(engine_cpus=each, engine_gpus=_gpus(config), per_node=most)


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
    if found.get("GPU", 0) < least * gpus:
        raise ConfigError(
            f"The Ray cluster has {found.get('GPU', 0):g} GPUs, fewer than the {least * gpus:g} "
            f"that {least} replicas need.",
            param="data_parallel_size",
        )
    per_node = 1 if gpus else max(1, math.ceil(least / max(1, len(nodes))))
    spare = config.server.api_server_count
    ranks = config.engine.parallel.tensor_parallel_size
    each = max(ranks, int((min(nodes, default=0) - spare) // per_node))
    need, there = least * each + spare, found.get("CPU", 0)
    if need > there:
        raise ConfigError(
            f"The Ray cluster has {there:g} CPUs; {least} replicas and {spare} processes for HTTP "
            f"need {need}.",
            param="data_parallel_size",
        )
    return Resources(engine_cpus=each, engine_gpus=gpus, per_node=per_node)


def _gpus(config: ServedConfig) -> float:
    """Return the GPUs of a replica: one for each of its ranks, where the cluster has some."""
    if config.engine.model.device == "cpu" or not ray.cluster_resources().get("GPU", 0):
        return 0
    return config.engine.parallel.tensor_parallel_size
