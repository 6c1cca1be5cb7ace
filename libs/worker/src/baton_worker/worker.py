"""A worker process: settings to engine, memory, transports, servers, discovery; and back. `services/*` configure it."""

import abc
import asyncio
import importlib.metadata
from collections.abc import Sequence
from contextlib import AsyncExitStack
from typing import ClassVar, cast

from baton_contracts.discovery.v1.instance_pb2 import Capability, Instance
from baton_contracts.discovery.v1.instance_pb2 import Service as ServiceKind
from baton_contracts.worker.v1 import handoff_service_pb2_grpc, worker_service_pb2_grpc
from baton_handoff.config import HandoffConfig
from baton_handoff.manager import HandoffManager
from baton_handoff.transports import Transport, TransportUnavailable
from baton_runtime.discovery import Discovery, Registration
from baton_runtime.drain import Holdings
from baton_runtime.errors import ConfigError
from baton_runtime.instance_service import serve_instance
from baton_runtime.lifecycle import Service
from baton_runtime.log import get_logger
from baton_runtime.metrics import MetricsServer
from baton_runtime.rpc import GrpcServer
from baton_runtime.telemetry import Telemetry, configure_telemetry

from baton_worker.assembly import (
    OpenedEngine,
    allocate,
    bind_engine,
    instance_record,
    load_engine,
    make_sglang,
    native_transport,
    sglang_hash_block_tokens,
    transports_of,
)
from baton_worker.config import WorkerConfig
from baton_worker.core import WorkerCore

log = get_logger(__name__)

# Streams have been ended before; what is left are calls that answer at once.
SERVER_GRACE_S = 0.2


class Worker(Service, abc.ABC):
    """Base of the prefill and decode services.

    kind, distribution: which service this is, and which distribution has its version.
    """

    kind: ClassVar["ServiceKind"]
    distribution: ClassVar[str]

    def __init__(self, config: WorkerConfig) -> None:
        super().__init__(config)
        self._core: WorkerCore | None = None
        self._server: GrpcServer | None = None
        self._registration: Registration | None = None
        self._record = Instance()

    @property
    @abc.abstractmethod
    def capabilities(self) -> Sequence["Capability"]:
        """What this instance may be given."""

    @property
    def worker_config(self) -> WorkerConfig:
        """The settings."""
        return cast(WorkerConfig, self.config)

    async def start(self) -> None:
        """Load, serve, register. What is entered here into `closing` ends in reverse order.

        Raises: ConfigError naming the setting, also if the model is missing or does not fit.
        """
        config = self.worker_config
        telemetry = self._open_telemetry()
        metrics = MetricsServer(advertise=config.advertise)
        metrics_address = await metrics.start(config.metrics_listen)
        self.closing.push_async_callback(metrics.close)  # 9
        discovery = Discovery(config.etcd, config.etcd_namespace)
        await discovery.start()
        self.closing.push_async_callback(discovery.close)  # 8: also takes the record out, if the drain has not
        opened = await self._open_sglang() if config.engine == "sglang" else await self._open_engine()
        engine = opened.engine
        transports = await open_transports(opened.transports, self.name, self.closing)
        server = self._server = GrpcServer(config.listen, config.advertise)
        handoffs = HandoffManager(
            engine=engine,
            instance=lambda: self._record,
            transports=transports,
            telemetry=telemetry,
            registry=metrics.registry,
            config=HandoffConfig(
                look_ahead_tokens=2 * config.max_chunk_tokens,
                max_queued=config.max_waiting,
                max_tickets=config.max_waiting,
                max_readers=config.max_readers,
                max_readers_per_sink=config.max_readers_per_sink,
                fetch_min_tokens=config.fetch_min_tokens,
                fetch_min_limit_s=config.fetch_min_limit_s,
            ),
            view=discovery.view(ServiceKind.SERVICE_KVTRANSFER),
        )
        core = self._core = WorkerCore(
            instance_id=self.instance_id,
            incarnation=self.incarnation,
            engine=engine,
            handoffs=handoffs,
            capabilities=self.capabilities,
            tracer=telemetry.tracer,
            registry=metrics.registry,
        )
        worker_service_pb2_grpc.add_WorkerServiceServicer_to_server(core.servicer, server.server)
        handoff_service_pb2_grpc.add_HandoffServiceServicer_to_server(handoffs.servicer, server.server)
        serve_instance(self, server)
        grpc_address = await server.start()
        self.closing.push_async_callback(server.close, SERVER_GRACE_S)  # 4
        self._record = instance_record(
            config,
            service=self.kind,
            distribution=self.distribution,
            instance_id=self.instance_id,
            incarnation=self.incarnation,
            grpc_address=grpc_address,
            metrics_address=metrics_address,
            opened=opened,
            transports=transports,
            capabilities=self.capabilities,
        )
        await handoffs.open()
        self.closing.push_async_callback(handoffs.close)  # 3
        self._run_tasks(core)  # 2
        core.servicer.open()
        self.closing.callback(core.close)  # 1: streams do not end by themselves
        self.log_ready(grpc_address=grpc_address, metrics_address=metrics_address)
        self._registration = await discovery.register(self._record)

    async def drain(self) -> None:
        """Say so in discovery, refuse new work, finish or hand back the rest, take the record out."""
        if self._core is None or self._server is None or self._registration is None:
            return
        self._record.draining = True
        self._registration.update(self._record)
        self._server.set_serving(False)
        await self._core.drain(lambda: self.drain_state.remaining_s)
        await self._registration.revoke()

    def holdings(self) -> Holdings:
        """What is running, pinned and reserved."""
        return self._core.state.holdings() if self._core is not None else Holdings()

    def _open_telemetry(self) -> Telemetry:
        config = self.config
        version = importlib.metadata.version(self.distribution)
        telemetry = configure_telemetry(
            self.name, version, self.instance_id, self.incarnation, config.otlp_endpoint, config.trace_sample_ratio
        )
        self.closing.push_async_callback(telemetry.close)  # 10: last, it takes the others' spans
        return telemetry

    async def _open_engine(self) -> OpenedEngine:
        """Read weights, take memory, start the engine. Loading and warming up take seconds: in a thread."""
        config = self.worker_config
        loaded = await asyncio.to_thread(load_engine, config, self.name)
        made = await asyncio.to_thread(allocate, config, self.name, loaded, self.incarnation)
        self.closing.callback(made.memory.close)  # 7
        engine = await asyncio.to_thread(bind_engine, made, self.name)
        await engine.open()
        self.closing.push_async_callback(engine.close)  # 6
        return OpenedEngine(engine, made.loaded.hash_block_tokens, transports_of(config, self.name, made, self.incarnation))

    async def _open_sglang(self) -> OpenedEngine:
        """Start a server and wait for it: that takes up to minutes, in which it may be ended."""
        config = self.worker_config
        engine = await asyncio.to_thread(make_sglang, config, self.name, self.capabilities)
        self.closing.push_async_callback(engine.close)  # 6
        await engine.open()
        return OpenedEngine(engine, sglang_hash_block_tokens(config), [native_transport(config, engine)])

    def _run_tasks(self, core: WorkerCore) -> None:
        for work, name in ((core.run_engine(), "engine"), (core.run_clock(), "clock"), (core.stall_watch.run(), "stall watch")):
            self.closing.callback(self.tasks.create_task(work, name=name).cancel)


async def open_transports(transports: Sequence[Transport], service: str, closing: AsyncExitStack) -> list[Transport]:
    """Open all; nixl is left out, with a warning, if its hardware is missing and there is another. closing closes them.

    Raises: ConfigError naming the service's setting.
    """
    opened = []
    for transport in transports:
        closing.push_async_callback(transport.close)
        try:
            await transport.open()
        except TransportUnavailable as error:
            if transport.name == "nixl" and len(transports) > 1:
                log.warning("transport_left_out", why=str(error))
                continue
            setting = "transfer_listen" if transport.name == "tcp" else "transports"
            raise ConfigError(f"{service}.{setting}", str(error)) from error
        opened.append(transport)
    return opened
