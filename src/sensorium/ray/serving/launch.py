"""``sensorium serve`` with replicas: start, announcement, draining and end."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import re
import secrets
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import ray
from ray import serve
from ray.serve.context import _get_global_client

from sensorium import __version__, environment
from sensorium.config import ServedConfig, ServerConfig
from sensorium.errors import ConfigError
from sensorium.ray.logs import show_logs
from sensorium.ray.serving.app import ENCODER, ENGINE, QUIET, Resources, application, check
from sensorium.ray.serving.claims import Claims, Phase, Start
from sensorium.ray.serving.cluster import connected, missing, most_replicas
from sensorium.ray.start import START_FAILED
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
_PENDING = re.compile(r"has (\d+) replicas that\s+have taken more than \S+ to be scheduled")
"""In what Ray Serve says of a deployment whose replicas have waited for a place for 30 s."""
END_SPARE = 10.0
"""Most seconds that the end takes beyond ``shutdown_timeout``, which is for running requests. What
has not ended by then ends by itself: replicas on a cluster, processes of a cluster of our own."""
_HURRY_SECONDS = 2.0
"""Most seconds for the end after a second signal, so that a cluster hears of it."""
_FAILED = ("DEPLOY_FAILED", "UNHEALTHY")
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
        self._claims = Claims(self._name)
        self._was_there = False
        """True where the application was there before: then a start that fails leaves it."""
        self._is_up = False

    def run(self) -> None:
        """Start, serve until ``stop``, and end. Raises ConfigError."""
        with connected(self._model) as resources:
            if self.stop.is_set():
                return
            show_logs()
            ends_at: float | None = None
            try:
                if self._start(resources):
                    self._is_up = True
                    self._announce()
                    self.stop.wait()
                    ends_at = time.monotonic() + self._model.server.shutdown_timeout + END_SPARE
                    self.until_hurry(self._drain, ends_at - END_SPARE / 2)
            finally:
                if ends_at is None:
                    ends_at = time.monotonic() + END_SPARE
                self.until_hurry(self._end, ends_at)

    def until_hurry(self, work: Callable[[], None], ends_at: float) -> None:
        """Run what waits for the cluster, no longer than until ``ends_at`` or a second signal."""
        thread = threading.Thread(target=_quietly, args=(work,), daemon=True)
        thread.start()
        hurried = False
        while thread.is_alive() and time.monotonic() < ends_at:
            if self.hurry.is_set() and not hurried:
                hurried = True
                ends_at = min(ends_at, time.monotonic() + _HURRY_SECONDS)
            thread.join(_LOOK_SECONDS)

    def _start(self, resources: Resources) -> bool:
        """Deploy, and wait until all is up; False when a signal comes first."""
        self._start_serve()
        self.find_address()
        num_encoders = self._model.server.encoder_replicas
        and_encoders = f" and {num_encoders} replicas of encoders" if num_encoders else ""
        logger.info("starting %d replicas%s", most_replicas(self._model), and_encoders)
        others = self._claims.add()
        found = self.found_there(others)
        if self.stop.is_set():
            return False
        # Where all is as before, Ray Serve keeps the replicas, which these must not be.
        is_useless = self._claims.ending() is not None or _has_failed(found)
        fresh = secrets.token_hex(8) if is_useless else ""
        app = application(self._model, resources, fresh=fresh)
        server = self._model.server
        target = serve.RunTarget(app, name=self._name, route_prefix=server.root_path or "/")
        serve.run_many([target], wait_for_applications_running=False)
        self._claims.deployed()
        return self._has_come_up(resources)

    def found_there(self, others: Sequence[Start]) -> Any:
        """Return the application that is there, None where there is none, and say whose it is.

        Waits while another start deletes it. ``others``: starts that still run.
        """
        while self._claims.ending() is Phase.DELETING:
            if self.stop.wait(_LOOK_SECONDS):
                return None
        found = serve.status().applications.get(self._name)
        while found is not None and found.status == "DELETING" and not self.stop.is_set():
            self.stop.wait(_LOOK_SECONDS)
            found = serve.status().applications.get(self._name)
        self._was_there = found is not None
        if found is not None:
            places = ", ".join(start.place for start in others)
            logger.info(
                "the application %r is there already (%s): what has changed is replaced, and it "
                "ends with this command",
                self._name,
                f"served by {places}" if others else "no command is left that would end it",
            )
        return found

    def _has_come_up(self, resources: Resources) -> bool:
        """Wait until all is up; False when a signal comes first. Raises ConfigError."""
        has_said = False
        while not self.stop.wait(_LOOK_SECONDS):
            found = serve.status().applications.get(self._name)
            if found is None:
                raise ConfigError(f"The application {self._name!r} was ended while it started.")
            if found.status == "RUNNING":
                return True
            if _has_failed(found):
                raise _failure(found)
            has_said = has_said or say_what_is_missing(found, resources)
        return False

    def _start_serve(self) -> None:
        """Start Ray Serve where it does not run yet."""
        server = self._model.server
        serve.start(
            proxy_location="HeadOnly" if server.ray_address is None else "EveryNode",
            http_options={
                "host": server.host,
                "port": self._port,
                "keep_alive_timeout_s": _KEEP_ALIVE_SECONDS,
                "ssl_certfile": server.ssl_certfile,
                "ssl_keyfile": server.ssl_keyfile,
            },
            logging_config=QUIET,
        )

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
        if not self._claims.end(Phase.DRAINING):
            logger.info("another start has taken over the application %r: it goes on", self._name)
            return
        logger.info("finishing running requests; a second signal stops at once")
        serve.get_app_handle(self._name).broadcast("drain").results()

    def _end(self) -> None:
        """End the application; on a cluster of our own, all of Ray Serve.

        It goes on where another start has a part in it, and where it was there before and this one
        never got it up. After a second signal a cluster of our own ends anyway.
        """
        if self._model.server.ray_address is None:
            if not self.hurry.is_set():
                serve.shutdown()
            return
        is_own = self._is_up or not (self._was_there or self._claims.others())
        if is_own and self._claims.end(Phase.DELETING):
            serve.delete(self._name, _blocking=not self.hurry.is_set())
            self._claims.clear()
            return
        self._claims.remove()
        if self._was_there and not self._claims.others():
            logger.warning(
                "the application %r goes on, and no command is left that would end it: start one "
                "with this --ray-application again, which takes it over",
                self._name,
            )


def _has_failed(found: Any) -> bool:
    """Return whether an application, if there is one, has failed."""
    return found is not None and found.status in _FAILED


def _quietly(work: Callable[[], None]) -> None:
    """Run one step of the end; what it needs may be gone already."""
    try:
        work()
    except Exception as error:
        logger.debug("at the end: %s", error)


def say_what_is_missing(found: Any, resources: Resources) -> bool:
    """Say in the log what the cluster lacks for replicas that wait for a place; return if so."""
    for name, deployment in found.deployments.items():
        waiting = _PENDING.search(deployment.message)
        if waiting is not None:
            known = {ENGINE: resources.of_engine, ENCODER: resources.of_encoder}
            own = known.get(name, {"CPU": resources.server_cpus})
            logger.warning("%s", missing(name, int(waiting[1]), own, ray.available_resources()))
            return True
    return False


def _failure(found: Any) -> ConfigError:
    """Return the error of an application that did not start, with the reason of a replica."""
    messages = [found.message, *(d.message for d in found.deployments.values())]
    for message in messages:
        if reason := _ENDED.search(message):
            return ConfigError(reason.group(1))
    last = [line for line in messages[0].splitlines() if line.strip()][-1:]
    return ConfigError(f"The replicas could not start: {' '.join(last) or 'see the log of Ray'}")
