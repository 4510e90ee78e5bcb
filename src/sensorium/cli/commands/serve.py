"""``sensorium serve MODEL...``, and its deprecated name ``run``."""

from __future__ import annotations

import argparse
from typing import Any

from sensorium import environment
from sensorium.cli.flags import (
    add_engine_flags,
    add_server_flags,
    build_engine_config,
    build_server_config,
)
from sensorium.cli.options import not_default
from sensorium.config import ServedConfig, check_models
from sensorium.engine.serving.process import EngineProcess
from sensorium.errors import ConfigError
from sensorium.processes.start import STOPS, forgo_pools, interrupts_held

DESCRIPTION = (
    "Serve one or several models over HTTP, compatible with OpenAI's API; the model of a request "
    "chooses among them. On SIGTERM running requests are finished before the server stops."
)

COMMON = {
    "--host": "--host 0.0.0.0",
    "--port": "--port 9000",
    "--api-key": "--api-key change-me",
    "--served-model-name": "--served-model-name assistant",
    "--max-model-len": "--max-model-len 8k",
    "--quantization": "--quantization int8",
    "--num-threads": "--num-threads 8",
    "--limit-mm-per-prompt": "--limit-mm-per-prompt '{\"image\": 4}'",
    "--allowed-local-media-path": "--allowed-local-media-path /srv/media",
    "--config": "--config serve.yaml",
}
"""Flags of the short help, with examples."""


def add_parser(commands: Any) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "serve",
        aliases=["run"],
        help="serve models over HTTP",
        usage="%(prog)s [MODEL ...] [options]",
        description=DESCRIPTION,
    )
    parser.add_argument(
        "model_argument",
        metavar="MODEL",
        nargs="*",
        help="Hugging Face ids, local folders, or 'demo' (default: demo)",
    )
    parser.has_models = True
    add_server_flags(parser)
    add_engine_flags(parser)
    parser.common = COMMON
    parser.set_defaults(handler=run)


def add_model_argument(parser: argparse.ArgumentParser) -> None:
    """Add the positional argument MODEL, as an alternative to ``--model``."""
    parser.add_argument(
        "model_argument",
        metavar="MODEL",
        nargs="?",
        help="Hugging Face id, local folder, or 'demo' (default: demo)",
    )


def take_model_argument(arguments: argparse.Namespace) -> None:
    """Use MODEL as ``--model``. Raises ConfigError when both are given and differ."""
    named, flagged = arguments.model_argument, getattr(arguments, "model", None)
    if named and flagged and named != flagged:
        raise ConfigError(f"The model is given twice: {named!r} and --model {flagged!r}.")
    if named:
        arguments.model = named


def models_of(arguments: argparse.Namespace) -> list[argparse.Namespace]:
    """Return the flags of each model, with its name as ``model``. Raises ConfigError."""
    if arguments.listed_models:
        return list(arguments.listed_models)
    named = list(arguments.model_argument)
    if len(named) > 1 and hasattr(arguments, "served_model_name"):
        raise ConfigError(
            "--served-model-name names one model. Name several in a file: --config, with models.",
            param="served_model_name",
        )
    found = []
    for name in named or [None]:
        model = argparse.Namespace(**{**vars(arguments), "model_argument": name})
        take_model_argument(model)
        found.append(model)
    return found


def run(arguments: argparse.Namespace) -> int:
    """Serve until a signal stops the server."""
    forgo_pools()
    server = build_server_config(arguments)
    given = models_of(arguments)
    models = [
        ServedConfig(engine=build_engine_config(model), server=build_server_config(model))
        for model in given
    ]
    check_models(models)
    options = "; ".join(
        not_default(model, config.engine, config.server)
        for model, config in zip(given, models, strict=True)
    )
    environment.set_log_level(server.log_level)
    if any(wants_replicas(model) for model in models):
        return _serve_replicas(models, options)
    # A signal waits until the server can stop in order.
    with interrupts_held(STOPS), EngineProcess() as process:
        if not all(model.server.on_demand for model in models):
            # Before the server's libraries are imported, which the engine does not wait for then.
            process.start()
        from sensorium.server.launch import serve

        serve(models, server, process, options=options)
    return 0


def wants_replicas(model: ServedConfig) -> bool:
    """Return True for a model that is to run as replicas on Ray."""
    server = model.server
    asked = server.ray_address is not None or server.autoscale is not None
    asked = asked or server.encoder_replicas > 0
    return asked or model.engine.parallel.data_parallel_size > 1


def _serve_replicas(models: list[ServedConfig], options: str) -> int:
    """Serve one model by replicas on Ray. Raises ConfigError for several."""
    if len(models) > 1:
        raise ConfigError(
            "Replicas serve one model. Start a server for each.", param="data_parallel_size"
        )
    from sensorium.ray.cluster import require_ray
    from sensorium.ray.extra import prepare_serving

    require_ray()
    prepare_serving()
    with interrupts_held(STOPS):
        from sensorium.ray.serving.launch import serve_replicas

        serve_replicas(models[0], options=options)
    return 0
