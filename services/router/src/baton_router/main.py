"""baton-router: wiring only."""

import importlib.metadata
import os

from baton_contracts.discovery.v1 import instance_pb2 as discovery
from baton_contracts.router.v1 import router_service_pb2_grpc as pb_grpc
from baton_runtime.config import config_file, load
from baton_runtime.discovery import Discovery, Registration
from baton_runtime.instance_service import serve_instance
from baton_runtime.lifecycle import Service, run
from baton_runtime.metrics import MetricsServer
from baton_runtime.rpc import GrpcServer
from baton_runtime.telemetry import configure_telemetry

from baton_router.config import RouterConfig
from baton_router.feeds import Feeds
from baton_router.fleet import Fleet
from baton_router.index import BlockIndex
from baton_router.metrics import RouterMetrics
from baton_router.placement import Placer
from baton_router.service import RouterServicer

VERSION = importlib.metadata.version("baton-router")


class RouterService(Service):
    """A router process."""

    name = "router"
    config: RouterConfig
    _registration: Registration

    async def start(self) -> None:
        """Serve, follow all workers, then register."""
        c = self.config
        telemetry = configure_telemetry(self.name, VERSION, self.instance_id, self.incarnation, c.otlp_endpoint, c.trace_sample_ratio)
        self.closing.push_async_callback(telemetry.close)  # 5: last, it takes the others' spans
        discovery_client = Discovery(c.etcd, c.etcd_namespace)
        await discovery_client.start()
        self.closing.push_async_callback(discovery_client.close)  # 4
        metrics_server = MetricsServer(advertise=c.advertise)
        metrics_address = await metrics_server.start(c.metrics_listen)
        self.closing.push_async_callback(metrics_server.close)  # 3
        fleet, index = Fleet(), BlockIndex(c.max_index_blocks)
        view = discovery_client.view(discovery.SERVICE_PREFILL, discovery.SERVICE_DECODE)
        feeds = Feeds(c, self.instance_id, view, fleet, index, self.tasks)
        feeds.start()
        self.closing.callback(feeds.close)  # 2
        server = GrpcServer(c.listen, c.advertise)
        servicer = RouterServicer(Placer(c, fleet, index), fleet, telemetry, RouterMetrics(metrics_server.registry, fleet, index))
        pb_grpc.add_RouterServiceServicer_to_server(servicer, server.server)
        serve_instance(self, server)
        self.closing.push_async_callback(server.close)  # 1: first, nobody may ask any more
        address = await server.start()
        self.log_ready(grpc_address=address, metrics_address=metrics_address)
        self._registration = await discovery_client.register(
            discovery.Instance(
                service=discovery.SERVICE_ROUTER,
                instance_id=self.instance_id,
                incarnation=self.incarnation,
                version=VERSION,
                contracts_version=importlib.metadata.version("baton-contracts"),
                grpc_address=address,
                metrics_address=metrics_address,
                pid=os.getpid(),
                zone=c.zone,
            )
        )

    async def drain(self) -> None:
        """Leave discovery; a placement takes no time, so nothing else is to be finished."""
        await self._registration.revoke()


def main() -> None:
    """Entry point of `baton-router`."""
    file = config_file("router", version=VERSION)
    run(lambda: RouterService(load(RouterConfig, "router", file)))


if __name__ == "__main__":
    main()
