"""Start, announcement, draining and shutdown of a server."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import ipaddress
import logging
import os
import signal
import socket
import ssl
import stat
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import uvicorn
from fastapi import FastAPI

from sensorium import __version__, environment
from sensorium.config import ServedConfig, ServerConfig, check_models
from sensorium.engine.serving.process import EngineProcess
from sensorium.errors import ConfigError, InvalidRequestError
from sensorium.forks import OWN_THREADS
from sensorium.metrics.prometheus import ServingMetrics
from sensorium.processes.start import STOPS
from sensorium.server.adapters.checks import check_adapters
from sensorium.server.app import build_app
from sensorium.server.context import ServingContext
from sensorium.server.http.http11 import MAX_HEADER_BYTES, StrictH11Protocol
from sensorium.server.http.loop_lag import LagSampler
from sensorium.server.models.lookup import ServedModels
from sensorium.server.models.start import served_models
from sensorium.text.chat.rendering import checked_kwargs

logger = logging.getLogger("sensorium.server")

_KEEP_ALIVE_SECONDS = 65
CLOSING_SECONDS = 2
_LEAST_LEVELS = (
    ("uvicorn", logging.WARNING),
    ("asyncio", logging.INFO),
    ("python_multipart", logging.ERROR),  # it warns of forms that clients send
)
_POLL_SECONDS = 0.05
SWITCH_SECONDS = 0.001
"""Interval at which Python threads yield to each other. Python's default, 5 ms, would add up to
5 ms of lag each time the event loop returns from a system call."""


def serve(
    models: Sequence[ServedConfig],
    config: ServerConfig,
    process: EngineProcess | None = None,
    *,
    options: str = "",
) -> None:
    """Serve until SIGTERM or SIGINT; then let running requests finish.

    ``process``: that of the first engine, where it has been started already. ``options``: those
    that are set, and where, for the log. Raises ConfigError when the address, the certificate or
    all models cannot be used.
    """
    configure_logging(config)
    logger.info("options: %s", options or "all defaults")
    check_config(config)
    check_models(models)
    check_adapters(models, config)
    for model in models:
        check_template_kwargs(model.server.default_chat_template_kwargs)
    if unread := environment.unread_variables():
        logger.warning("environment variables without effect: %s", ", ".join(unread))
    asyncio.run(_serve(served_models(models, config, process), config))


@contextlib.contextmanager
def listening(config: ServerConfig) -> Iterator[socket.socket]:
    """Give the bound socket that ``config`` names; close it, and remove its file, at the end.

    Raises ConfigError when the address cannot be used.
    """
    if config.uds is None:
        listener = listening_socket(config.host, config.port)
    else:
        listener = unix_socket(config.uds)
    with _closing(listener, config):
        yield listener


@contextlib.contextmanager
def _closing(listener: socket.socket, config: ServerConfig) -> Iterator[None]:
    """Close a bound socket at the end, and remove its file."""
    with contextlib.closing(listener):
        try:
            yield
        finally:
            if config.uds is not None:
                with contextlib.suppress(OSError):
                    os.unlink(config.uds)


def listening_socket(host: str, port: int) -> socket.socket:
    """Return a bound socket. It is bound before the model loads, so that a port in use fails early.

    Raises ConfigError when the address cannot be used.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise ConfigError(
            f"Cannot listen on {host}:{port}: {error.strerror}.", param="host"
        ) from error
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        listener.close()
        raise ConfigError(
            f"Cannot listen on {host}:{port}: {error.strerror}.", param="port"
        ) from error
    return listener


def unix_socket(path: str) -> socket.socket:
    """Return a bound Unix domain socket; a file that a server has left there is replaced.

    Raises ConfigError when the path cannot be used.
    """
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        if _is_abandoned(path):
            os.unlink(path)
        listener.bind(path)
    except OSError as error:
        listener.close()
        raise ConfigError(
            f"Cannot listen on {path}: {error.strerror or error}.", param="uds"
        ) from error
    return listener


def _is_abandoned(path: str) -> bool:
    """Return whether ``path`` is a socket on which nobody listens."""
    try:
        if not stat.S_ISSOCK(os.stat(path).st_mode):
            return False
    except FileNotFoundError:
        return False
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            return True
    return False


class StopSignals:
    """SIGTERM and SIGINT: the first sets ``stop``, the second ``hurry``."""

    def __init__(self) -> None:
        self.stop = asyncio.Event()
        self.hurry = asyncio.Event()

    @contextlib.contextmanager
    def installed(self) -> Iterator[StopSignals]:
        """Catch the signals within the block."""
        loop = asyncio.get_running_loop()
        for number in STOPS:
            loop.add_signal_handler(number, self.on_signal)
        # The command line holds them until now.
        before = signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPS)
        try:
            yield self
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
            for number in STOPS:
                loop.remove_signal_handler(number)

    def on_signal(self) -> None:
        """Count one more signal."""
        if self.stop.is_set():
            self.hurry.set()
        self.stop.set()


async def _serve(models: ServedModels, config: ServerConfig) -> None:
    with StopSignals().installed() as signals:
        listener = await bound_listener(config, signals)
        if listener is None:
            return
        with _closing(listener, config):
            await _serve_on(listener, models, config, signals)


async def bound_listener(config: ServerConfig, signals: StopSignals) -> socket.socket | None:
    """Return the bound socket, or None when a signal comes before the host's name is resolved.

    The C library's look-up cannot be interrupted, and may take long: it runs in a thread for which
    the end of the process does not wait. Raises ConfigError when the address cannot be used.
    """
    if config.uds is not None:
        return unix_socket(config.uds)
    loop = asyncio.get_running_loop()
    found: asyncio.Future[socket.socket] = loop.create_future()

    def tell(listener: socket.socket | None, error: ConfigError | None) -> None:
        if found.done():
            return
        if listener is not None:
            found.set_result(listener)
        elif error is not None:
            found.set_exception(error)

    def look_up() -> None:
        listener, error = None, None
        try:
            listener = listening_socket(config.host, config.port)
        except ConfigError as raised:
            error = raised
        with contextlib.suppress(RuntimeError):  # the loop has ended meanwhile
            loop.call_soon_threadsafe(tell, listener, error)

    threading.Thread(target=look_up, name=f"{OWN_THREADS}look-up", daemon=True).start()
    stopping = asyncio.create_task(signals.stop.wait())
    await asyncio.wait((found, stopping), return_when=asyncio.FIRST_COMPLETED)
    stopping.cancel()
    if found.done():
        return found.result()
    found.cancel()
    return None


async def _serve_on(
    listener: socket.socket, models: ServedModels, config: ServerConfig, signals: StopSignals
) -> None:
    app = build_app(models, config)
    app.state.context.files.clear_stale()
    starting = asyncio.create_task(models.start())
    stopping = asyncio.create_task(signals.stop.wait())
    try:
        await asyncio.wait((starting, stopping), return_when=asyncio.FIRST_COMPLETED)
        if not starting.done():
            return
        starting.result()
        reduce_pauses()
        await run_app(app, config, listener, signals)
    finally:
        stopping.cancel()
        starting.cancel()
        await asyncio.gather(starting, return_exceptions=True)
        await models.close()
        app.state.context.files.close()


def reduce_pauses() -> None:
    """Reduce pauses of the event loop.

    Objects made during the start stay; frozen, they are no longer scanned by full collections,
    which would block the loop for tens of milliseconds. Threads release the interpreter sooner.
    """
    gc.collect()
    gc.freeze()
    sys.setswitchinterval(SWITCH_SECONDS)


async def run_app(
    app: FastAPI,
    config: ServerConfig,
    listener: socket.socket,
    signals: StopSignals,
) -> None:
    """Serve ``app`` until a signal asks to stop and its requests have ended or their time is over.

    The engines are ended before the connections are closed, so that requests that still run
    are answered with an error.
    """
    server = _Server(_uvicorn_config(app, config))
    context: ServingContext = app.state.context
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    stopping = asyncio.create_task(signals.stop.wait())
    announcing = asyncio.create_task(_announce(server, context, listener))
    try:
        with LagSampler(context.metrics.loop_lag):
            await asyncio.wait((serving, stopping), return_when=asyncio.FIRST_COMPLETED)
            await context.batches.close()
            await drain(context, signals.hurry)
    finally:
        announcing.cancel()
        stopping.cancel()
        await context.batches.close()
        await context.models.close()
        server.should_exit = True
        await serving
        context.files.close()


class _Server(uvicorn.Server):
    """uvicorn's server with signals handled outside; ``listening`` is set when it listens."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.listening = asyncio.Event()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Install no signal handlers."""
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen, and set ``listening``."""
        await super().startup(sockets)
        self.listening.set()


async def _announce(server: _Server, context: ServingContext, listener: socket.socket) -> None:
    await server.listening.wait()
    config = context.config
    log_access(config)
    address = _address(config, listener)
    names = ", ".join(model.name for model in context.models)
    print(f"Sensorium {__version__} serving {names} at {address}", flush=True)


def _address(config: ServerConfig, listener: socket.socket) -> str:
    if config.uds is not None:
        return f"unix:{config.uds}"
    scheme = "https" if config.ssl_certfile else "http"
    host = f"[{config.host}]" if ":" in config.host else config.host
    return f"{scheme}://{host}:{listener.getsockname()[1]}{config.root_path}"


def log_access(config: ServerConfig) -> None:
    """Log if requests need an API key; a warning where other machines may send some without."""
    if config.api_key:
        logger.info("requests need an API key; accepted keys: %d", len(config.api_key))
    elif config.uds is not None:
        logger.info(
            "requests need no API key; programs that may write to %s can use it", config.uds
        )
    elif _is_loopback(config.host):
        logger.info("requests need no API key; the server listens on the loopback interface only")
    else:
        logger.warning(
            "requests need no API key, and the server listens on %s: anyone who can reach it can "
            "use it; set a key with --api-key or SENSORIUM_API_KEY",
            config.host,
        )


def _is_loopback(host: str) -> bool:
    """Return true for names and addresses of the loopback interface."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


async def drain(context: ServingContext, hurry: asyncio.Event) -> None:
    """Refuse new work and wait for what is running, at most ``shutdown_timeout`` seconds."""
    context.arrivals.drain()
    loop = asyncio.get_running_loop()
    deadline = loop.time() + context.config.shutdown_timeout
    if context.num_in_flight:
        logger.info("finishing %d requests; a second signal stops at once", context.num_in_flight)
    while context.num_in_flight and not hurry.is_set() and loop.time() < deadline:
        await asyncio.sleep(_POLL_SECONDS)
    if context.num_in_flight:
        logger.warning("stopping with %d requests unfinished", context.num_in_flight)


def _uvicorn_config(app: FastAPI, config: ServerConfig) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        http=StrictH11Protocol,
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        proxy_headers=False,
        server_header=False,
        timeout_keep_alive=_KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=CLOSING_SECONDS,
        h11_max_incomplete_event_size=MAX_HEADER_BYTES,
        ssl_certfile=config.ssl_certfile,
        ssl_keyfile=config.ssl_keyfile,
    )


def check_config(config: ServerConfig) -> None:
    """Check the configuration before a model is loaded. Raises ConfigError."""
    ServingMetrics(config.metrics_prefix)
    check_template_kwargs(config.default_chat_template_kwargs)
    folder = config.file_folder
    if folder and not (os.path.isdir(folder) and os.access(folder, os.W_OK | os.X_OK)):
        raise ConfigError(
            f"file_folder must be a folder that can be written to; got {folder!r}.",
            param="file_folder",
        )
    root = config.root_path
    if root and (not root.startswith("/") or root.endswith("/")):
        raise ConfigError(
            f"root_path must begin with a slash and not end with one, such as /llm; got {root!r}.",
            param="root_path",
        )
    if config.ssl_certfile is None:
        return
    try:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(config.ssl_certfile, config.ssl_keyfile)
    except (OSError, ssl.SSLError) as error:
        raise ConfigError(
            f"ssl_certfile and ssl_keyfile cannot be used: {error.strerror or error}.",
            param="ssl_certfile",
        ) from error


def check_template_kwargs(kwargs: Mapping[str, Any]) -> None:
    """Raise ConfigError for template variables that every chat request would be refused for."""
    try:
        checked_kwargs(kwargs, {})
    except InvalidRequestError as error:
        name = "default_chat_template_kwargs"
        message = error.message.replace("chat_template_kwargs", name, 1)
        raise ConfigError(message, param=name) from error


def configure_logging(config: ServerConfig) -> None:
    """Let this process and its children log as the options say."""
    environment.set_log_level(config.log_level)  # for the engine's process
    level = environment.log_level()
    logging.basicConfig(level=level, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    for name, least in _LEAST_LEVELS:
        logging.getLogger(name).setLevel(max(least, logging.getLogger().level))
