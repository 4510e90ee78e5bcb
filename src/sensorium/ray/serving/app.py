"""The application of Ray Serve: processes for HTTP, and the engines behind them."""

from __future__ import annotations

import dataclasses
import functools
import re
import secrets
from importlib import metadata
from pathlib import Path
from typing import Any

from blake3 import blake3
from ray import serve
from ray.serve import Application, Deployment
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy, RequestRouterConfig

from sensorium import __version__, environment
from sensorium.config import (
    GIB,
    EngineConfig,
    ServedConfig,
    ServerConfig,
    engine_config,
    engine_option_names,
)
from sensorium.errors import ConfigError
from sensorium.models.loading.checkpoint import DEMOS
from sensorium.ray.encoders.check import check_encoders
from sensorium.ray.encoders.replica import Encoder
from sensorium.ray.media.index import SharedIndex
from sensorium.ray.media.names import NamesIndex
from sensorium.ray.serving.engine import STATS_SECONDS, Engine
from sensorium.ray.serving.server import ingress

ENGINE, SERVER, EMBEDDINGS, NAMES = "Engine", "Server", "Embeddings", "Names"
ENCODER = "Encoder"
"""Names of the deployments."""
MOST_REQUESTS = 1 << 16
"""Requests that Ray Serve lets into one process for HTTP, which has limits of its own."""
MOST_ITEMS, MOST_QUEUED_ITEMS = 16, 1024
"""Items that one encoder has at a time, and that wait for some encoder in one process for HTTP."""
HEALTH_SECONDS = 5.0
HEALTH_TIMEOUT = 60.0
DRAIN_SPARE = 10.0
"""Seconds that a replica gets to end, beyond those for its requests."""
LOOK_BACK_SECONDS = 15.0
UP_SECONDS, DOWN_SECONDS = 5.0, 120.0
"""Time over which loads are averaged, and for which more or fewer replicas must be wanted."""
_COMMIT = re.compile("[0-9a-f]{40}")
QUIET = {"log_level": "WARNING", "enable_access_log": False}
"""For Ray Serve's own log: ours has each request already."""
STARTS = 3
"""Attempts to start a replica before a deployment counts as failed."""


@dataclasses.dataclass(frozen=True, slots=True)
class Resources:
    """Resources of each process.

    ``per_node``: engines and encoders that share the cores of a machine. ``encoder_gpus``: None for
    one where engines have some.
    """

    engine_cpus: float = 1
    engine_gpus: float = 0
    encoder_cpus: float = 1
    encoder_gpus: float | None = None
    server_cpus: float = 1
    per_node: int = 1

    @property
    def of_engine(self) -> dict[str, float]:
        """Return what an engine reserves, by Ray's names."""
        return {"CPU": self.engine_cpus, "GPU": self.engine_gpus}

    @property
    def of_encoder(self) -> dict[str, float]:
        """Return what an encoder reserves, by Ray's names."""
        gpus = self.encoder_gpus
        return {
            "CPU": self.encoder_cpus,
            "GPU": min(1.0, self.engine_gpus) if gpus is None else gpus,
        }


def build_app(options: dict[str, Any]) -> Application:
    """Return the application for a Serve configuration file.

    ``options``: those of ``sensorium serve`` by their keywords, such as ``model`` and
    ``data_parallel_size``, and ``engine_cpus``, ``engine_gpus``, ``encoder_cpus``,
    ``server_cpus`` and ``per_node``. API keys of the environment are added. Raises ConfigError.
    """
    given = dict(options)
    reserved = [f.name for f in dataclasses.fields(Resources) if f.name in given]
    resources = Resources(**{n: given[n] for n in reserved})
    for name in reserved:
        if name != "encoder_gpus":  # an option of the server, too
            del given[name]
    names = {field.name for field in dataclasses.fields(ServerConfig)} - set(engine_option_names())
    of_server = {name: given.pop(name) for name in list(given) if name in names}
    for name, value in of_server.items():
        if isinstance(value, list):
            of_server[name] = tuple(value)
    keys = of_server.get("api_key") or ()
    keys = (keys,) if isinstance(keys, str) else keys
    of_server["api_key"] = (*keys, *environment.api_keys_of_environment())
    config = ServedConfig(engine=engine_config(**given), server=ServerConfig(**of_server))
    return application(config, resources)


def application(config: ServedConfig, resources: Resources, fresh: str = "") -> Application:
    """Return the application of one model. Raises ConfigError for what replicas cannot have.

    Deployed again with the same options it replaces nothing. ``fresh``: a text that no application
    had before, which replaces all.
    """
    check(config)
    server = _shared_out(config.server)
    engines = _engines(config.engine, server, resources, fresh)
    encoders = _encoders(config.engine, server, resources, engines, fresh)
    deployment = serve.deployment(
        ingress(),
        name=SERVER,
        num_replicas=server.api_server_count,
        max_ongoing_requests=MOST_REQUESTS,
        **_lives(server),
        ray_actor_options={"num_cpus": resources.server_cpus},
    )
    served = ServedConfig(engine=config.engine, server=server)
    names = _names(config.engine, server, fresh)
    return _versioned(deployment, fresh, served).bind(served, engines, names, encoders)


def _versioned(deployment: Deployment, fresh: str, *options: object) -> Deployment:
    """Return a deployment whose replicas Ray Serve replaces when the version differs.

    Without one, Ray Serve makes up another at each start.
    """
    return deployment.options(version=version_of(fresh, *options), _internal=True)


def version_of(fresh: str, *options: object) -> str:
    """Return a text that is the same while nothing has changed of what replicas are made of.

    ``options``: all of that but handles of other deployments. Files that they name, and those of
    Sensorium itself, count with their sizes and times, where this machine has them.
    """
    digest = blake3(repr((_code(), fresh, *map(_plain, options))).encode())
    return digest.hexdigest(length=16)


@functools.cache
def _code() -> tuple[object, ...]:
    """Return what tells this installation of Sensorium from others; looked up once."""
    libraries = [metadata.version(name) for name in ("torch", "ray")]
    return __version__, libraries, _files(Path(__file__).parents[2], "*.py")


def _plain(option: object) -> object:
    """Return options as values whose text is the same in each process."""
    if isinstance(option, EngineConfig):
        return dataclasses.asdict(option), _named_files(option)
    if isinstance(option, ServedConfig):
        return _plain(option.engine), dataclasses.asdict(option.server)
    return option


def _named_files(config: EngineConfig) -> list[object]:
    """Return what is known here of the files that a model is made of.

    A model of the hub may have become another one unless its revision is a commit.
    """
    model = config.model
    named = [
        model.model,
        model.mmproj,
        model.chat_template,
        *(m.path for m in config.lora.modules()),
    ]
    found: list[object] = [_files(Path(name)) for name in named if name]
    if not found[0] and model.model not in DEMOS:
        found.append(
            model.revision if _COMMIT.fullmatch(model.revision or "") else secrets.token_hex(8)
        )
    return found


def _files(place: Path, pattern: str = "*") -> list[tuple[str, int, int]]:
    """Return names, sizes and times of change of a file, or of all files below a folder."""
    try:
        paths = sorted(place.rglob(pattern)) if place.is_dir() else [place]
        states = [(str(path), path.stat()) for path in paths if path.is_file()]
    except OSError:  # such as the text of a template, which is too long for a name
        return []
    return [(name, state.st_size, state.st_mtime_ns) for name, state in states]


def _lives(server: ServerConfig) -> dict[str, Any]:
    """Return how replicas of both kinds start, prove that they live, and end."""
    return {
        "graceful_shutdown_timeout_s": server.shutdown_timeout + DRAIN_SPARE,
        "graceful_shutdown_wait_loop_s": 0.2,
        "health_check_period_s": HEALTH_SECONDS,
        "health_check_timeout_s": HEALTH_TIMEOUT,
        "max_constructor_retry_count": STARTS,
        "logging_config": QUIET,
    }


def check(config: ServedConfig) -> None:
    """Raise ConfigError for options that replicas cannot have."""
    server = config.server
    if server.uds is not None:
        raise ConfigError("Ray Serve listens on host and port, not on a socket file.", param="uds")
    for name in ("on_demand", "model_idle_timeout", "allow_runtime_lora_updating"):
        if getattr(server, name):
            flag = f"--{name.replace('_', '-')}"
            raise ConfigError(f"{flag} is not available with replicas.", param=name)
    if server.encoder_replicas:
        check_encoders(config.engine)


def _engines(
    config: EngineConfig, server: ServerConfig, resources: Resources, fresh: str
) -> Application:
    scheduler = config.scheduler
    deployment = serve.deployment(
        Engine,
        name=ENGINE,
        max_ongoing_requests=scheduler.max_num_seqs + scheduler.max_num_waiting,
        **_lives(server),
        ray_actor_options={
            "num_cpus": resources.engine_cpus,
            "num_gpus": resources.engine_gpus,
        },
        request_router_config=RequestRouterConfig(
            request_router_class="sensorium.ray.serving.router:EngineRouter",
            request_router_kwargs={"num_routers": server.api_server_count},
            request_routing_stats_period_s=STATS_SECONDS,
            request_routing_stats_timeout_s=10 * STATS_SECONDS,
        ),
        **_number(config, server),
    )
    options = _alone(config), resources.per_node, _level(server)
    index = _index(server, fresh)
    most_shared = server.shared_embeddings_gb if index is not None else 0
    return _versioned(deployment, fresh, *options, most_shared).bind(*options, index)


def _alone(config: EngineConfig) -> EngineConfig:
    """Return the options as they hold for one replica."""
    one = dataclasses.replace(config.parallel, data_parallel_size=1)
    return dataclasses.replace(config, parallel=one)


def _level(server: ServerConfig) -> str:
    return (server.log_level or environment.log_level()).lower()


def _encoders(
    config: EngineConfig,
    server: ServerConfig,
    resources: Resources,
    engines: Application,
    fresh: str,
) -> Application | None:
    """Return the deployment that encodes media apart from the engines, where there is one."""
    if not server.encoder_replicas:
        return None
    reserved = resources.of_encoder
    if bool(reserved["GPU"]) != bool(resources.engine_gpus):
        raise ConfigError(
            f"encoder_gpus is {reserved['GPU']:g} and engines have {resources.engine_gpus:g} GPUs: "
            "another kind of device makes other embeddings, which the engines would not take. "
            "Leave it unset, or, so that encoders share GPUs, set a part of one, such as 0.5.",
            param="encoder_gpus",
        )
    deployment = serve.deployment(
        Encoder,
        name=ENCODER,
        num_replicas=server.encoder_replicas,
        max_ongoing_requests=MOST_ITEMS,
        max_queued_requests=MOST_QUEUED_ITEMS,
        **_lives(server),
        ray_actor_options={"num_cpus": reserved["CPU"], "num_gpus": reserved["GPU"]},
        request_router_config=RequestRouterConfig(
            request_router_class="sensorium.ray.encoders.router:EncoderRouter",
            request_routing_stats_period_s=STATS_SECONDS,
            request_routing_stats_timeout_s=10 * STATS_SECONDS,
        ),
    )
    threads = max(1, int(resources.encoder_cpus))
    options = _alone(config), resources.per_node, threads, _level(server)
    return _versioned(deployment, fresh, *options).bind(*options, engines)


def _index(server: ServerConfig, fresh: str) -> Application | None:
    """Return the deployment that knows which embeddings replicas share, where they do.

    Where encoders are apart, the processes for HTTP keep what these have made instead.
    """
    if server.encoder_replicas:
        return None
    return _one_index(SharedIndex, EMBEDDINGS, int(server.shared_embeddings_gb * GIB), fresh)


def _names(config: EngineConfig, server: ServerConfig, fresh: str) -> Application | None:
    """Return the directory of the media that clients name by ids, for several processes."""
    if server.api_server_count == 1:
        return None
    most_bytes = int(config.cache.mm_processor_cache_gb * GIB)
    return _one_index(NamesIndex, NAMES, most_bytes, fresh)


def _one_index(
    kind: type[SharedIndex], name: str, most_bytes: int, fresh: str
) -> Application | None:
    """Return the deployment of an index, None where it could keep nothing."""
    if not most_bytes:
        return None
    deployment = serve.deployment(
        kind,
        name=name,
        num_replicas=1,
        max_ongoing_requests=MOST_REQUESTS,
        ray_actor_options={"num_cpus": 0},
    )
    return _versioned(deployment, fresh, most_bytes).bind(most_bytes)


def _number(config: EngineConfig, server: ServerConfig) -> dict[str, Any]:
    """Return how many replicas there are, or between which numbers Ray Serve chooses."""
    if server.replica_range is None:
        return {"num_replicas": config.parallel.data_parallel_size}
    least, most = server.replica_range
    scaling = AutoscalingConfig(
        min_replicas=least,
        max_replicas=most,
        initial_replicas=max(least, min(most, config.parallel.data_parallel_size)),
        policy=AutoscalingPolicy(policy_function="sensorium.ray.serving.scaling:scale"),
        look_back_period_s=LOOK_BACK_SECONDS,
        upscale_delay_s=UP_SECONDS,
        downscale_delay_s=DOWN_SECONDS,
    )
    return {"num_replicas": None, "autoscaling_config": scaling}


def _shared_out(server: ServerConfig) -> ServerConfig:
    """Return the options without stores that several processes would each have for themselves."""
    if server.api_server_count == 1:
        return server
    return dataclasses.replace(server, max_stored_files=0, response_store_entries=0, max_batches=0)
