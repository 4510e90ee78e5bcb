"""``sensorium serve`` with replicas: start, announcement, draining and end."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import re
import secrets
import threading
from typing import Any

from ray import serve
from ray.serve.context import _get_global_client

from sensorium import __version__, environment
from sensorium.config import ServedConfig, ServerConfig
from sensorium.errors import ConfigError
from sensorium.ray.serving.app import QUIET, Resources, application, check
from sensorium.ray.serving.cluster import connected, most_replicas
from sensorium.ray.serving.engine import START_FAILED
from sensorium.ray.serving.logs import show_logs
from sensorium.server.adapters.checks import check_adapters
from sensorium.server.launch import (
    StopSignals,
    bound_listener,
    check_config,
    check_template_kwargs,
    configure_logging,
    log_access,
)

logger = logging.getLogger("sensorium.server")

_KEEP_ALIVE_SECONDS = 65
_LOOK_SECONDS = 0.25
_ENDED = re.compile(re.escape(START_FAILED) + r"(.*)")


def serve_replicas(model: ServedConfig, *, options: str = "") -> None:
    """Serve until SIGTERM or SIGINT; then let running requests finish.

    ``options``: those that are set, for the log. Raises ConfigError when Ray, the address or the
    model cannot be used.
    """
    configure_logging(model.server)
    logger.info("options: %s", options or "all defaults")
    check_config(model.server)
    check(model)
    check_adapters([model], model.server)
    check_template_kwargs(model.server.default_chat_template_kwargs)
    if unread := environment.unread_variables():
        logger.warning("environment variables without effect: %s", ", ".join(unread))
    asyncio.run(_serve(model))


async def _serve(model: ServedConfig) -> None:
    with StopSignals().installed() as signals:
        port = await _free_port(model.server, signals)
        if port is None:
            return
        # Ray's calls wait: in a thread, so that signals are heard meanwhile.
        run = ReplicasRun(model, port)
        await _until(run, signals)


async def _free_port(config: ServerConfig, signals: StopSignals) -> int | None:
    """Return the port to listen on, which was free a moment ago; None when a signal comes first.

    On a cluster that there is, Ray Serve may listen on it already. Raises ConfigError.
    """
    if config.ray_address is not None and config.port:
        return config.port
    listener = await bound_listener(config, signals)
    if listener is None:
        return None
    with contextlib.closing(listener):
        return int(listener.getsockname()[1])


async def _until(run: ReplicasRun, signals: StopSignals) -> None:
    """Run until a signal comes, then end; a second signal ends at once."""
    thread = asyncio.create_task(asyncio.to_thread(run.run))
    stopping = asyncio.create_task(signals.stop.wait())
    await asyncio.wait((thread, stopping), return_when=asyncio.FIRST_COMPLETED)
    run.stop.set()
    hurrying = asyncio.create_task(signals.hurry.wait())
    await asyncio.wait((thread, hurrying), return_when=asyncio.FIRST_COMPLETED)
    run.hurry.set()
    await thread
    for task in (stopping, hurrying):
        task.cancel()


class ReplicasRun:
    """One run of replicas, in a thread: ``stop`` and ``hurry`` come from signals."""

    def __init__(self, model: ServedConfig, port: int) -> None:
        self.stop = threading.Event()
        self.hurry = threading.Event()
        self._model = model
        self._host, self._port = model.server.host, port
        self._name = model.server.ray_application
        self._owner = secrets.token_hex(8)
        self._is_ours = False
        """True where the end of this run ends the application: no other start has a part in it."""

    def run(self) -> None:
        """Start, serve until ``stop``, and end. Raises ConfigError."""
        with connected(self._model) as resources:
            if self.stop.is_set():
                return
            show_logs()
            try:
                if self._start(resources):
                    self._announce()
                    self.stop.wait()
                    self._drain()
            finally:
                self._end()

    def _start(self, resources: Resources) -> bool:
        """Deploy, and wait until all is up; False when a signal comes first."""
        server = self._model.server
        local = server.ray_address is None
        serve.start(
            proxy_location="HeadOnly" if local else "EveryNode",
            http_options={
                "host": server.host,
                "port": self._port,
                "keep_alive_timeout_s": _KEEP_ALIVE_SECONDS,
                "ssl_certfile": server.ssl_certfile,
                "ssl_keyfile": server.ssl_keyfile,
            },
            logging_config=QUIET,
        )
        self.find_address()
        logger.info("starting %d replicas", most_replicas(self._model))
        app = application(self._model, resources, self._owner)
        # What fails or is stopped before it is up leaves the application that was there.
        self._is_ours = self._name not in serve.status().applications
        target = serve.RunTarget(app, name=self._name, route_prefix=server.root_path or "/")
        serve.run_many([target], wait_for_applications_running=False)
        while not self.stop.wait(_LOOK_SECONDS):
            found = serve.status().applications[self._name]
            if found.status == "RUNNING":
                self._is_ours = True
                return True
            if found.status in ("DEPLOY_FAILED", "UNHEALTHY"):
                raise _failure(found)
        return False

    def find_address(self) -> None:
        """Take over host and port of Ray Serve where that runs already on the cluster."""
        found = _get_global_client().http_config
        wanted = self._host, self._port
        self._host, self._port = found.host, found.port
        if wanted != (found.host, found.port) and self._model.server.port:
            logger.warning("Ray Serve listens on %s:%d already", found.host, found.port)

    def _announce(self) -> None:
        server = dataclasses.replace(self._model.server, host=self._host)
        log_access(server)
        scheme = "https" if server.ssl_certfile else "http"
        host = f"[{server.host}]" if ":" in server.host else server.host
        url = f"{scheme}://{host}:{self._port}{server.root_path}"
        name = self._model.names[0]
        print(f"Sensorium {__version__} serving {name} at {url}", flush=True)

    def _drain(self) -> None:
        """Refuse new requests and wait for running ones, unless another start has taken over."""
        self._is_ours = False  # also where nobody answers
        handle = serve.get_app_handle(self._name)
        self._is_ours = handle.owner.remote().result(timeout_s=10) == self._owner
        if not self._is_ours:
            logger.info("another start has taken over the application %r: it goes on", self._name)
            return
        logger.info("finishing running requests; a second signal stops at once")
        drained = handle.broadcast("drain")
        waiting = threading.Thread(target=lambda: _ignore(drained.results), daemon=True)
        waiting.start()
        while waiting.is_alive() and not self.hurry.is_set():
            waiting.join(_LOOK_SECONDS)

    def _end(self) -> None:
        """End the application; on a cluster of our own, all of Ray Serve.

        After a second signal nothing is waited for: a cluster of our own ends anyway.
        """
        hurry = self.hurry.is_set()
        with contextlib.suppress(Exception):
            if self._model.server.ray_address is None:
                if not hurry:
                    serve.shutdown()
            elif self._is_ours:
                serve.delete(self._name, _blocking=not hurry)


def _ignore(call: Any) -> None:
    with contextlib.suppress(Exception):
        call()


def _failure(found: Any) -> ConfigError:
    """Return the error of an application that did not start, with the reason of a replica."""
    messages = [found.message, *(d.message for d in found.deployments.values())]
    for message in messages:
        if reason := _ENDED.search(message):
            return ConfigError(reason.group(1))
    last = [line for line in messages[0].splitlines() if line.strip()][-1:]
    return ConfigError(f"The replicas could not start: {' '.join(last) or 'see the log of Ray'}")
