"""The service as a whole: its parts, its beginning and its end."""

from __future__ import annotations

import asyncio
import logging
import time

from tinsmith import __version__
from tinsmith.blobs import LocalBlobs
from tinsmith.engine.commands import Done, EngineClient, EngineLost, GetStatus
from tinsmith.settings import Settings
from tinsmith.store import Store, commands, references

from .aside import Asides
from .audit import AuditLog
from .billing import Billing
from .caller import Caller
from .catalog import Catalog
from .completions import Completions
from .context import Context
from .copies import Copies
from .errors import Unavailable
from .external import External
from .futures import Outcome, Pending
from .identity import Identities
from .keys import KeyRing
from .losses import CustomLosses, is_loss
from .metrics import Metrics
from .runs import Runs
from .samplers import Samplers
from .sampling import Sampling, is_sample
from .sessions import Sessions
from .signing import Signer
from .telemetry import Telemetry
from .timelines import Timelines
from .training import Training
from .uploads import Uploads

log = logging.getLogger("tinsmith.service")

_FLUSH_EVERY = 5.0
_SWEEP_EVERY = 60.0
_SAVING = 30.0  # seconds that a stop gives at least to what the engine has begun, and to saving


class Service:
    def __init__(self, settings: Settings, store: Store, blobs: LocalBlobs, engine: EngineClient) -> None:
        self.context = Context(settings, store, blobs, engine)
        self.keys = KeyRing(store, Identities.of_folder(settings.data))
        self.audit = AuditLog(self.context)
        self.sessions = Sessions(self.context)
        self.samplers = Samplers(self.context, self.sessions, self.audit)
        self.sampling = Sampling(self.context, self.sessions, self.samplers, self.audit)
        self.completions = Completions(self.context, self.samplers, self.sampling)
        self.runs = Runs(self.context, self.sessions, self.samplers)
        self.training = Training(self.context, self.sessions, self.keys, self.runs)
        self.asides = Asides(self.context, self.sessions)
        self.losses = CustomLosses(self.context, self.sessions)
        self.catalog = Catalog(self.context, self.sessions, self.runs, self.samplers)
        self.copies = Copies(self.context, self.sessions, self.keys, self.catalog)
        signer = Signer(settings.data / "url-signing.key")
        self.external = External(self.context, self.catalog, signer, self.audit)
        self.uploads = Uploads(self.context, self.sessions, signer)
        self.billing = Billing(self.context)
        self.telemetry = Telemetry(store, settings.telemetry_ttl, settings.telemetry_events)
        self.metrics = Metrics()
        self._engine_status: dict[str, object] = {}
        self._began = time.monotonic()
        self.timelines = Timelines(self.context, self.sessions, signer)
        self.started = False
        self.stopping = False
        self._closing: asyncio.Future[None] | None = None
        self._janitor: asyncio.Task[None] | None = None

    @property
    def ready(self) -> bool:
        """Whether work that comes now can be done now."""
        return self.started and not self.stopping and self.context.engine.ready

    def check_open(self) -> None:
        if self.stopping:
            raise Unavailable("the server is stopping; try again when it is back")
        if not self.started:
            raise Unavailable("the server is starting: the models are being loaded; try again in a moment")

    async def start(self) -> None:
        """Start the engine, then go on with what an earlier life of the server left in its log."""
        self._closing = asyncio.get_running_loop().create_future()
        await asyncio.to_thread(self._clean_up)
        await self.context.limits.start()
        await self.context.meter.start()
        await self.context.engine.start()
        await self.sessions.take_up()
        await self.runs.take_up()
        self._janitor = asyncio.get_running_loop().create_task(self._keep_house())
        self.started = True

    async def stop(self, grace: float) -> None:
        """Finish what runs, put every run away whole, and leave nothing unwritten."""
        self.stopping = True
        if self._janitor is not None:
            self._janitor.cancel()
        self.context.limits.stop()
        if self.started:
            await self.runs.settle(grace)
            await self.runs.put_all_away(max(grace, _SAVING))
            await self.samplers.put_away(_SAVING)
        if self._closing is not None and not self._closing.done():
            self._closing.set_result(None)  # wakes every long poll
        self.runs.flush()
        self.keys.flush()
        self.context.traces.flush(everything=True)
        await self.context.quiesce(5.0)
        await self.context.engine.stop(grace=5.0)

    async def outcome(self, caller: Caller, request_id: str) -> Outcome | Pending:
        """What became of a request, held back until there is something to say."""
        assert self._closing is not None
        part: Sampling | CustomLosses | Runs = self.runs
        if is_sample(request_id):
            part = self.sampling
        elif is_loss(request_id):
            part = self.losses
        return await part.outcome(caller, request_id, self.context.settings.poll_hold, self._closing)

    @property
    def closing(self) -> asyncio.Future[None]:
        assert self._closing is not None
        return self._closing

    async def status(self, patience: float = 10.0) -> dict[str, object]:
        """Figures for the operator. An engine that is busy for longer than `patience` seconds is shown as it
        was last seen."""
        if self.context.engine.ready:
            try:
                reply = await asyncio.wait_for(self.context.engine.submit(GetStatus()), patience)
                if isinstance(reply, Done) and isinstance(reply.payload, dict):
                    self._engine_status = reply.payload
            except (EngineLost, TimeoutError):
                pass
        engine = self._engine_status if self.started else {}
        samples, training = self.sampling.under_way, self.runs.pending
        return {
            "version": __version__,
            "ready": self.ready,
            "uptime_seconds": round(time.monotonic() - self._began, 3),
            "generation": self.context.engine.generation,
            "models": list(self.context.engine.info.models) if self.started else [],
            "device": self.context.engine.info.device if self.started else None,
            "runs": self.runs.counts(),
            "training_requests": training,
            "samples": samples,
            "queues": {
                "training_requests": training,
                "samples": samples,
                "runs_waiting_for_limits": self.context.limits.waiting,
                "engine_commands": engine.get("commands_waiting", 0),
                "sequences_running": engine.get("sequences_running", 0),
                "sequences_waiting": engine.get("sequences_waiting", 0),
            },
            "metered": dict(self.context.meter.totals),
            "engine": engine,
        }

    # Housekeeping

    async def _keep_house(self) -> None:
        look_every = min(15.0, self.context.settings.heartbeat_timeout / 4)
        sweep_every = min(_SWEEP_EVERY, self.context.settings.result_ttl / 4)
        flushed = looked = swept = time.monotonic()
        while True:
            await asyncio.sleep(min(_FLUSH_EVERY, look_every, sweep_every))
            now = time.monotonic()
            try:
                await self.sessions.look_for_ends()
                if now - flushed >= _FLUSH_EVERY or sweep_every < _FLUSH_EVERY:
                    flushed = now
                    self.runs.flush()
                    self.keys.flush()
                if now - looked >= look_every:
                    looked = now
                    self.sessions.look_for_silence()
                if now - swept >= sweep_every:
                    swept = now
                    await self._sweep()
            except Exception:
                log.exception("housekeeping failed; it is tried again")

    async def _sweep(self) -> None:
        self.sampling.sweep()
        await self.asides.sweep()
        await self.context.meter.keep_up()
        await self.catalog.sweep()
        await self.uploads.sweep()
        settings = self.context.settings
        await self.context.traces.sweep(settings.trace_ttl, settings.trace_limit)
        await self.timelines.sweep()
        await self.telemetry.sweep()
        store, blobs = self.context.store, self.context.blobs
        before = time.time() - self.context.settings.result_ttl
        keys = await store.write(lambda connection: commands.drop_results(connection, before))
        keys += await store.write(commands.drop_replayable_bodies)
        for key in keys:
            await asyncio.to_thread(blobs.delete, key)

    def _clean_up(self) -> None:
        """Remove what a crash left behind: files that nothing refers to."""
        blobs = self.context.blobs
        blobs.sweep_unfinished()

        keep = self.context.store.write_now(references.blobs)
        for kind in ("bodies", "results", "checkpoints", "snapshots", "samplers", "traces", "uploads"):
            for key in blobs.keys(kind):
                if key not in keep:
                    log.info("removing %s, which nothing refers to", key)
                    blobs.delete(key)
