"""The frontend's parts, put together: discovery -> streams to workers and routers -> requests -> HTTP."""

import asyncio
import os
import time
from collections.abc import Callable
from importlib.metadata import version

from baton_contracts.discovery.v1 import instance_pb2
from baton_runtime.discovery import Discovery, DiscoveryClient, Registration, View
from baton_runtime.drain import Holdings
from baton_runtime.errors import ConfigError
from baton_runtime.instance_service import serve_instance
from baton_runtime.lifecycle import LoopStallWatch, Service
from baton_runtime.metrics import MetricsServer
from baton_runtime.rpc import GrpcServer, advertised_address, split_address
from baton_runtime.telemetry import Telemetry, configure_telemetry
from prometheus_client import generate_latest

from baton_frontend.admission import Admission, AdmissionLimits
from baton_frontend.attach_client import Identity
from baton_frontend.config import FrontendConfig
from baton_frontend.connections import ConnectionLimits
from baton_frontend.http_server import HttpServer, tune_gc
from baton_frontend.metrics import FrontendMetrics
from baton_frontend.model_registry import ModelRegistry
from baton_frontend.openai_http import HttpSettings, OpenAIHandlers
from baton_frontend.request import RequestLimits
from baton_frontend.requests import ManagerSettings, RequestManager
from baton_frontend.route_client import RouteClient
from baton_frontend.tail_sampling import TailLimits, TailSampling
from baton_frontend.tokenizer import WorkPool
from baton_frontend.workers import Workers

FIRST_LIST_S = 2.0
FLUSH_S = 0.5
HTTP_CLOSE_S = 1.0


class FrontendService(Service):
    """One frontend process. discovery: instead of etcd, for tests."""

    name = "frontend"
    config: FrontendConfig

    def __init__(self, config: FrontendConfig, discovery: DiscoveryClient | None = None) -> None:
        super().__init__(config)
        self.http_address = ""
        self._discovery: DiscoveryClient = discovery or Discovery(config.etcd, config.etcd_namespace)
        self._view: View | None = None
        self._registration: Registration | None = None
        self._http: HttpServer | None = None
        self._server: GrpcServer | None = None
        self._manager: RequestManager | None = None

    async def start(self) -> None:
        """Order: telemetry, metrics, discovery, streams, requests, HTTP, gRPC. Serves when it returns, also while etcd is down."""
        config = self.config
        telemetry = configure_telemetry(
            self.name, version("baton-frontend"), self.instance_id, self.incarnation, config.otlp_endpoint, config.trace_sample_ratio
        )
        self.closing.push_async_callback(telemetry.close)
        metrics_server = MetricsServer(advertise=config.advertise)
        self.closing.push_async_callback(metrics_server.close)
        metrics_address = await metrics_server.start(config.metrics_listen)
        await self._discovery.start()
        self.closing.push_async_callback(self._discovery.close)
        metrics = FrontendMetrics(metrics_server.registry)
        admission = Admission(_admission_limits(config), metrics.on_admission_refused)
        metrics.watch(admission, metrics_server.registry)
        self._manager = manager = self._start_requests(telemetry, metrics, admission)
        # Before it listens: on a shared port the kernel gives it connections at once.
        if self._view is not None:
            await self._view.synced(FIRST_LIST_S)
        self._http = await self._start_http(manager, telemetry, metrics, lambda: generate_latest(metrics_server.registry))
        # Last in, first out: requests end with an answer before the sockets close.
        self.closing.push_async_callback(self._end_requests, manager)
        tune_gc()
        server = self._server = GrpcServer(config.listen, config.advertise)
        serve_instance(self, server)
        self.closing.push_async_callback(server.close)
        grpc_address = await server.start()
        self.log_ready(grpc_address=grpc_address, http_address=self.http_address, metrics_address=metrics_address)
        self._registration = await self._discovery.register(self._record(grpc_address, metrics_address))

    async def drain(self) -> None:
        """Leave discovery, refuse new work, wait until what came before is answered and the answers have left."""
        if self._server is not None:
            self._server.set_serving(False)
        if self._registration is not None:
            await self._registration.revoke()
        if self._manager is None:
            return
        self._manager.admission.set_draining()  # calls whose head has been read may still submit
        if self._http is not None:
            await self._http.stop_listening()
            await self._http.wait_idle()
        self._manager.set_draining()
        await self._manager.wait_idle()

    def holdings(self) -> Holdings:
        """Requests that are not answered yet."""
        return Holdings(running=self._manager.num_inflight) if self._manager is not None else Holdings()

    def _start_requests(self, telemetry: Telemetry, metrics: FrontendMetrics, admission: Admission) -> RequestManager:
        workers = Workers(Identity(self.instance_id, self.incarnation), time.monotonic)
        routes = RouteClient(time.monotonic)
        workers.open(self.tasks)
        self.closing.callback(workers.close)
        routes.open(self.tasks)
        self.closing.callback(routes.close)
        view = self._view = self._discovery.view(instance_pb2.SERVICE_ROUTER, instance_pb2.SERVICE_PREFILL, instance_pb2.SERVICE_DECODE)

        def update(_: object) -> None:
            listed = [instance for instance in view.instances.values() if not view.is_gone(instance)]
            routes.update([instance for instance in listed if instance.service == instance_pb2.SERVICE_ROUTER])
            workers.update([instance for instance in listed if instance.service != instance_pb2.SERVICE_ROUTER])

        manager = RequestManager(
            incarnation=self.incarnation,
            workers=workers,
            routes=routes,
            tracer=telemetry.tracer,
            metrics=metrics,
            admission=admission,
            settings=_manager_settings(self.config),
            clock=time.monotonic,
            call_later=asyncio.get_running_loop().call_later,
            forget=view.forget,
            tail=_tail(self.config, telemetry, metrics),
        )
        self.closing.callback(view.subscribe(update))
        self.tasks.create_task(manager.run(), name="requests")
        self.tasks.create_task(LoopStallWatch(on_stall=workers.on_stall).run(), name="stall-watch")
        return manager

    async def _start_http(
        self, manager: RequestManager, telemetry: Telemetry, metrics: FrontendMetrics, exposition: Callable[[], bytes]
    ) -> HttpServer:
        config = self.config
        pool = WorkPool(config.tokenizer_threads)
        self.closing.callback(pool.close)
        settings = HttpSettings(
            max_body_bytes=config.max_body_bytes,
            body_timeout_s=config.body_timeout_s,
            max_generations=config.max_generations,
            slow_reader_limit_bytes=config.slow_reader_limit_bytes,
            slow_reader_timeout_s=config.slow_reader_timeout_s,
        )
        limits = ConnectionLimits(
            max_header_bytes=config.max_header_bytes,
            head_timeout_s=config.head_timeout_s,
            idle_timeout_s=config.idle_timeout_s,
            slow_reader_timeout_s=config.slow_reader_timeout_s,
        )
        registry = ModelRegistry(pool, config.model_load_timeout_s)
        self.tasks.create_task(registry.keep_loaded(manager.models), name="models")
        handlers = OpenAIHandlers(
            manager,
            registry,
            settings,
            admission=manager.admission,
            tail=manager.tail,
            tracer=telemetry.tracer,
            observer=metrics,
            is_ready=lambda: manager.is_ready,
        )
        http = HttpServer(handlers, limits, metrics=exposition, close_timeout_s=HTTP_CLOSE_S)
        self.closing.push_async_callback(http.close)
        try:
            bound = await http.start(config.http_listen, reuse_port=config.http_reuse_port)
        except (OSError, ValueError) as error:
            raise ConfigError("frontend.http_listen", f"cannot listen on {config.http_listen!r}: {error}") from error
        port = split_address(bound)[1]
        assert port is not None, "a bound socket has a port"
        host, listen_port = split_address(config.http_listen)
        self.http_address = advertised_address(f"{host}:{listen_port or 0}", port, split_address(config.advertise)[0])
        return http

    async def _end_requests(self, manager: RequestManager) -> None:
        manager.set_draining()
        manager.abort_all()
        await manager.workers.flush(FLUSH_S)

    def _record(self, grpc_address: str, metrics_address: str) -> instance_pb2.Instance:
        return instance_pb2.Instance(
            service=instance_pb2.SERVICE_FRONTEND,
            instance_id=self.instance_id,
            incarnation=self.incarnation,
            version=version("baton-frontend"),
            contracts_version=version("baton-contracts"),
            grpc_address=grpc_address,
            http_address=self.http_address,
            metrics_address=metrics_address,
            pid=os.getpid(),
            zone=self.config.zone,
        )


def _tail(config: FrontendConfig, telemetry: Telemetry, metrics: FrontendMetrics) -> TailSampling | None:
    if telemetry.late is None:
        return None  # nothing is exported
    limits = TailLimits(config.trace_slow_ttft_s, config.trace_slow_tpot_s, config.trace_late_per_s)
    return TailSampling(telemetry.late, limits, time.monotonic, metrics.on_late_trace)


def _admission_limits(config: FrontendConfig) -> AdmissionLimits:
    return AdmissionLimits(
        max_inflight=config.max_inflight,
        max_inflight_tokens=config.max_inflight_tokens,
        max_held_bytes=config.max_held_bytes,
        retry_after_ms=config.retry_after_ms,
    )


def _manager_settings(config: FrontendConfig) -> ManagerSettings:
    return ManagerSettings(
        resumes_per_tick=config.resumes_per_tick,
        route_limit_s=config.route_limit_s,
        limits=RequestLimits(
            max_attempts=config.max_attempts,
            new_patience_s=config.new_patience_s,
            resume_patience_s=config.resume_patience_s,
            deadline_s=config.default_deadline_s,
        ),
    )
