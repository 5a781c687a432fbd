"""tinsmith serve: the server, from its first line to its last."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import fcntl
import logging
import os
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, cast

import uvicorn

from tinsmith import __version__, logs
from tinsmith.api import make_app
from tinsmith.blobs import LocalBlobs
from tinsmith.engine.commands import EngineClient, EngineConfig
from tinsmith.service.key_administration import first_key
from tinsmith.service.prices import PricesError, PriceTable
from tinsmith.service.service import Service
from tinsmith.settings import Settings, SettingsError
from tinsmith.store import Store
from tinsmith.tracing import Tracing

from .options import add_settings, read_settings

log = logging.getLogger("tinsmith")

MakeEngine = Callable[[EngineConfig], EngineClient]


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser("serve", help="serve Tinker's API")
    add_settings(parser)
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    from tinsmith.engine.process import ProcessEngine

    return serve(read_settings(arguments), ProcessEngine)


def serve(settings: Settings, make_engine: MakeEngine) -> int:
    """Serve until a signal comes. The exit code."""
    logs.set_up(settings.log_level, settings.log_format)
    for noisy in ("alembic", "uvicorn"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    try:
        PriceTable.read(settings.prices)
    except PricesError as error:
        raise SettingsError(f"prices: {error}") from None
    settings.data.mkdir(parents=True, exist_ok=True)
    with _locked(settings.data):
        store = Store.open(Store.local_url(settings.data))
        try:
            new_key = first_key(store, _bootstrap_key())
            return asyncio.run(_serve(settings, store, make_engine, new_key))
        finally:
            store.close()


async def _serve(settings: Settings, store: Store, make_engine: MakeEngine, new_key: str | None) -> int:
    engine = make_engine(
        EngineConfig(
            models=settings.models,
            spill_dir=str(settings.data / "spill"),
            device=settings.device,  # type: ignore[arg-type]
            dtype=settings.dtype,  # type: ignore[arg-type]
            max_context=settings.max_context,
            max_rank=settings.max_rank,
            memory=settings.memory,
            threads=settings.threads,
            deterministic=settings.deterministic,
            log_level="warning" if settings.log_level == "info" else settings.log_level,
            log_format=settings.log_format,
            trust_remote_code=settings.trust_remote_code,
        )
    )
    service = Service(settings, store, LocalBlobs(settings.data / "blobs"), engine)
    tracing = Tracing(endpoint) if (endpoint := _collector(settings)) else None
    service.context.traces.observer = tracing
    server = _Server(
        uvicorn.Config(
            make_app(service, settings.root_path.rstrip("/"), tracing),
            host=settings.host,
            port=settings.port,
            http="httptools",
            ws="none",
            lifespan="off",
            timeout_keep_alive=120,
            timeout_graceful_shutdown=3,
            access_log=False,
            log_config=None,
            server_header=False,
        )
    )
    stop = _StopSignals()
    listener = _listen(settings)
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    starting = asyncio.create_task(service.start())
    stopping = asyncio.create_task(stop.first.wait())
    given_up = asyncio.create_task(engine.given_up())
    code = 0
    try:
        await asyncio.wait({starting, stopping, serving}, return_when=asyncio.FIRST_COMPLETED)
        if starting.done():
            if (error := starting.exception()) is not None:
                log.debug("the engine did not start", exc_info=error)
                print(f"tinsmith: the engine did not start: {error}", file=sys.stderr)
                code = 1
            else:
                _print_banner(settings, service, listener, new_key)
                await asyncio.wait({stopping, serving, given_up}, return_when=asyncio.FIRST_COMPLETED)
        if given_up.done():
            print("tinsmith: the engine keeps dying and has been given up; the log says how", file=sys.stderr)
            code = 1
        if serving.done() and not stop.first.is_set():
            serving.result()
            code = 1
    finally:
        code = await _stop(service, server, serving, starting, stop, settings.grace) or code
        stopping.cancel()
        given_up.cancel()
        if tracing is not None:
            await asyncio.to_thread(tracing.close)
    return code


def _collector(settings: Settings) -> str:
    """Where traces go; OpenTelemetry's own variable counts, too."""
    return settings.otlp_endpoint or os.environ.get("OTEL_EXPORTER_OTLP_ENDPOINT", "")


async def _stop(
    service: Service,
    server: _Server,
    serving: asyncio.Task[None],
    starting: asyncio.Task[None],
    stop: _StopSignals,
    grace: float,
) -> int:
    """Finish and save; at a second signal, stop where we are."""
    if stop.first.is_set():
        print("tinsmith: stopping; finishing what runs (once more Ctrl-C stops at once)", file=sys.stderr)
    starting.cancel()
    work = asyncio.create_task(service.stop(grace))
    hurry = asyncio.create_task(stop.second.wait())
    await asyncio.wait({work, hurry}, return_when=asyncio.FIRST_COMPLETED)
    code = 0
    if not work.done():
        work.cancel()
        code = 130
        with contextlib.suppress(Exception):
            await asyncio.wait_for(service.context.engine.stop(grace=0.0), 5.0)
    elif (error := work.exception()) is not None:
        log.error("stopping failed", exc_info=error)
        code = 1
    hurry.cancel()
    server.should_exit = True
    server.force_exit = code == 130
    with contextlib.suppress(asyncio.CancelledError):
        await asyncio.wait({serving}, timeout=10.0)
    return code


class _Server(uvicorn.Server):
    """uvicorn, with its signals left to us: a stop is more than closing connections."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class _StopSignals:
    def __init__(self) -> None:
        self.first = asyncio.Event()
        self.second = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._on_signal)

    def _on_signal(self) -> None:
        (self.second if self.first.is_set() else self.first).set()


def _listen(settings: Settings) -> socket.socket:
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    # asyncio switches Nagle's algorithm off for sockets that say they are TCP, and for no others. With it an
    # answer, which goes out in two parts, waits 40 ms for the client's delayed acknowledgement.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((settings.host, settings.port))
    except OSError as error:
        listener.close()
        raise SettingsError(
            f"cannot listen on {settings.host}:{settings.port}: {error.strerror}; choose another --port"
        ) from None
    listener.listen(2048)
    listener.setblocking(False)
    return listener


@contextlib.contextmanager
def _locked(data: Path) -> Iterator[None]:
    """Two servers on one data folder would undo each other's work."""
    with open(data / "lock", "a+") as file:
        try:
            fcntl.flock(cast(IO[str], file), fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise SettingsError(
                f"the data folder {data} is in use by another server; stop it, or choose another --data"
            ) from None
        yield


def _bootstrap_key() -> str | None:
    key = os.environ.get("TINSMITH_BOOTSTRAP_API_KEY") or None
    if key is not None and (not key.startswith("tml-") or key == "tml-"):
        raise SettingsError("TINSMITH_BOOTSTRAP_API_KEY must begin with tml- and go on")
    return key


def _print_banner(settings: Settings, service: Service, listener: socket.socket, new_key: str | None) -> None:
    host, port = listener.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    info = service.context.engine.info
    lines = [
        f"tinsmith {__version__}",
        f"  address   http://{shown}:{port}{settings.root_path}",
        f"  device    {info.device}, exact: {'yes' if info.exact else 'no'}",
    ]
    for model in info.models.values():
        lines.append(
            f"  model     {model.name} ({model.parameters / 1e6:.1f} M parameters, {model.dtype},"
            f" context {model.max_context})"
        )
    lines.append(f"  data      {settings.data}")
    if new_key is not None:
        lines.append(f"  API key   {new_key}  (shown this once; more: tinsmith keys create NAME)")
    print("\n".join(lines), flush=True)
