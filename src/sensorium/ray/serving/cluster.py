"""Resources of replicas: on a cluster that there is, or on one of our own on this machine."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import ray

from sensorium.config import ServedConfig
from sensorium.errors import ConfigError
from sensorium.processes import cores
from sensorium.ray.cluster import ray_cluster
from sensorium.ray.serving.app import Resources

logger = logging.getLogger("sensorium.server")

NAMESPACE = "serve"


@dataclass(frozen=True, slots=True)
class Need:
    """Needs of replicas: ``engines`` at least, each of ``ranks`` processes.

    ``gpus``: of an engine. ``encoder_gpus``: of each of the replicas that encode media apart.
    ``others_cpus``: CPUs of all processes that are neither, which may be on any machine.
    """

    engines: int
    ranks: int = 1
    gpus: float = 0
    others_cpus: float = 0
    encoders: int = 0
    encoder_gpus: float = 0

    @property
    def all_gpus(self) -> float:
        """GPUs of all of them."""
        return self.engines * self.gpus + self.encoders * self.encoder_gpus

    @property
    def described(self) -> str:
        """Kinds and numbers of replicas, for messages."""
        encoders = f" and {self.encoders} of encoders" if self.encoders else ""
        return f"{self.engines} replicas{encoders}"

    @property
    def least_cpus(self) -> int:
        """Return the CPUs without which an engine does not start: ranks on GPUs may share one."""
        return 1 if self.gpus else self.ranks


@contextlib.contextmanager
def connected(config: ServedConfig) -> Iterator[Resources]:
    """Connect to the cluster of ``--ray-address``, or run one of our own for the block.

    Gives what each process may reserve. Raises ConfigError when Ray cannot be used or the cluster
    has not enough processors or GPUs, UnavailableError when nothing answers at the address.
    """
    address = config.server.ray_address
    if address is not None:
        logger.info("connecting to Ray at %s", address)
        with ray_cluster(address, namespace=NAMESPACE, show_logs=True):
            nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
            has_gpus = any(node.get("GPU", 0) for node in nodes)
            yield divided(nodes, _need(config, has_gpus))
        return
    most, encoders = most_replicas(config), config.server.encoder_replicas
    usable = cores.find().num_usable
    each = own_engine_cpus(usable, most, config.engine.parallel.tensor_parallel_size, encoders)
    of_encoder = max(1, usable // (most + encoders))
    num_cpus = each * most + of_encoder * encoders + config.server.api_server_count
    logger.info("starting Ray on this machine")
    with ray_cluster(num_cpus=num_cpus, namespace=NAMESPACE, show_logs=True):
        found = ray.cluster_resources().get("GPU", 0)
        need = dataclasses.replace(_need(config, has_gpus=bool(found)), engines=most)
        check_own(usable, found, need)
        yield Resources(
            engine_cpus=each,
            engine_gpus=need.gpus,
            encoder_cpus=of_encoder,
            encoder_gpus=need.encoder_gpus,
            per_node=most + encoders,
        )


def most_replicas(config: ServedConfig) -> int:
    """Return the most engines that may run at a time."""
    span = config.server.replica_range
    return span[1] if span is not None else config.engine.parallel.data_parallel_size


def own_engine_cpus(usable: int, engines: int, ranks: int, encoders: int = 0) -> int:
    """Return the CPUs of each engine on this machine, of which replicas may share some."""
    if (processes := engines * ranks + encoders) > usable:
        logger.warning("%d processes of replicas share %d processors", processes, usable)
    return max(ranks, usable // (engines + encoders))


def check_own(usable: int, gpus: float, need: Need) -> None:
    """Raise ConfigError where this machine, with so many processors and GPUs, has too little.

    Ranks on GPUs may share processors; on CPUs they would wait for each other.
    """
    if not need.gpus and need.ranks > usable:
        raise ConfigError(
            f"{need.ranks} ranks need {need.ranks} processors; this machine has {usable}.",
            param="tensor_parallel_size",
        )
    if need.all_gpus > gpus:
        raise ConfigError(
            f"This machine has {gpus:g} GPUs; {need.described} need {need.all_gpus:g}. Run fewer "
            "replicas, or with --device cpu.",
            param="data_parallel_size",
        )


def divided(nodes: Sequence[Mapping[str, float]], need: Need) -> Resources:
    """Return what each process reserves on a cluster whose machines have these resources.

    All engines get the same, as Ray Serve knows one number for all replicas: what they can have on
    the smallest machine that can hold one. A machine that cannot, such as a head with 0 CPUs, does
    not count. Raises ConfigError where the machines have too little.
    """
    able = [node for node in nodes if _holds(node, need)]
    if not able:
        raise _too_small(nodes, need)
    sharing = _sharing(able, need)
    shares = [_share(node, number, need) for node, number in zip(able, sharing, strict=True)]
    each, of_encoder = max(need.least_cpus, min(shares)), max(1, min(shares))
    _check_places(nodes, able, each, of_encoder, need)
    if max(shares) > each:
        logger.info(
            "each engine reserves %d CPUs, its part of the smallest machine that can hold one; on "
            "the largest of %d machines it would be %d",
            *(each, len(able), max(shares)),
        )
    return Resources(
        engine_cpus=each,
        engine_gpus=need.gpus,
        encoder_cpus=of_encoder,
        encoder_gpus=need.encoder_gpus,
        # Of unequal machines with GPUs each takes the cores that it finds, as no number fits all.
        per_node=sharing[0] if len(set(sharing)) == 1 else 1,
    )


def _sharing(able: Sequence[Mapping[str, float]], need: Need) -> list[int]:
    """Return among how many engines and encoders to divide the cores of each machine.

    With GPUs as many engines as it has GPUs for, as Ray may fill a machine before it takes the next
    one, and encoders beside them on each. Raises ConfigError where all together have too few GPUs.
    """
    if not need.gpus:
        return [-(-(need.engines + need.encoders) // len(able))] * len(able)
    most = [int(node["GPU"] // need.gpus) for node in able]
    if sum(most) < need.engines:
        raise ConfigError(
            f"The Ray cluster has GPUs for {sum(most)} replicas of {need.gpus:g} GPUs each on "
            f"a machine; {need.engines} are wanted.",
            param="data_parallel_size",
        )
    return [engines + bool(need.encoders) for engines in most]


def _check_places(
    nodes: Sequence[Mapping[str, float]],
    able: Sequence[Mapping[str, float]],
    each: int,
    of_encoder: int,
    need: Need,
) -> None:
    """Raise ConfigError where engines of ``each`` CPUs, encoders and the rest find no place.

    ``able``: the machines that can hold an engine.
    """
    gpus = sum(node.get("GPU", 0) for node in nodes)
    if gpus < need.all_gpus:
        raise ConfigError(
            f"The Ray cluster has {gpus:g} GPUs, fewer than the {need.all_gpus:g} that "
            f"{need.described} need; --encoder-gpus sets those of encoders.",
            param="encoder_replicas",
        )
    places = sum(_places(node, each, need) for node in able)
    there = sum(node.get("CPU", 0) for node in nodes)
    wanted = each * need.engines + of_encoder * need.encoders + need.others_cpus
    if places < need.engines or there < wanted:
        raise ConfigError(
            f"The Ray cluster has {there:g} CPUs, of which machines that can hold a replica have "
            f"{sum(node.get('CPU', 0) for node in able):g}; {need.described} with {each} CPUs for "
            f"each engine and {need.others_cpus:g} CPUs for other processes need {wanted:g}.",
            param="data_parallel_size",
        )


def _holds(node: Mapping[str, float], need: Need) -> bool:
    """Return whether a machine can hold one engine."""
    return node.get("CPU", 0) >= need.least_cpus and node.get("GPU", 0) >= need.gpus


def _share(node: Mapping[str, float], engines: int, need: Need) -> int:
    """Return the CPUs of each engine where a machine has so many.

    What is no engine may be on it, too.
    """
    return int((node["CPU"] - need.others_cpus) // engines)


def _places(node: Mapping[str, float], each: int, need: Need) -> int:
    """Return how many engines of ``each`` CPUs a machine can hold."""
    places = int(node["CPU"] // each)
    return min(places, int(node["GPU"] // need.gpus)) if need.gpus else places


def _too_small(nodes: Sequence[Mapping[str, float]], need: Need) -> ConfigError:
    """Return the error of a cluster where no machine can hold an engine."""
    cpus = max((node.get("CPU", 0) for node in nodes), default=0)
    gpus = max((node.get("GPU", 0) for node in nodes), default=0)
    wanted = f"{need.least_cpus} CPUs" + (f" and {need.gpus:g} GPUs" if need.gpus else "")
    return ConfigError(
        f"A replica of {need.ranks} ranks needs {wanted} on one machine; the machines of the Ray "
        f"cluster have at most {cpus:g} CPUs and {gpus:g} GPUs.",
        param="tensor_parallel_size" if need.ranks > 1 else "data_parallel_size",
    )


def _need(config: ServedConfig, has_gpus: bool) -> Need:
    """Return what the replicas need, with a GPU for each rank where the cluster has some."""
    span = config.server.replica_range
    ranks = config.engine.parallel.tensor_parallel_size
    gpus = ranks if has_gpus and config.engine.model.device != "cpu" else 0
    of_encoder = config.server.encoder_gpus
    return Need(
        engines=span[0] if span is not None else config.engine.parallel.data_parallel_size,
        ranks=ranks,
        gpus=gpus,
        others_cpus=config.server.api_server_count,
        encoders=config.server.encoder_replicas,
        encoder_gpus=min(1.0, gpus) if of_encoder is None else of_encoder,
    )


def missing(name: str, num: int, each: Mapping[str, float], free: Mapping[str, float]) -> str:
    """Return what a cluster lacks for ``num`` replicas of a deployment that wait for a place.

    ``each``: what one of them reserves. ``free``: what is free on the whole cluster.
    """
    parts = [
        f"{number:g} {kind}s on one machine ({free.get(kind, 0):g} are free on all together)"
        for kind, number in each.items()
        if number
    ]
    return (
        f"{num} replicas of {name} wait for a place on the Ray cluster: each needs "
        f"{' and '.join(parts)}. Add machines, end other work, or run fewer replicas."
    )
