"""baton-kvtransfer: wiring only."""

import importlib.metadata
import os

from baton_contracts.discovery.v1 import instance_pb2 as discovery
from baton_contracts.kvtransfer.v1 import kvtransfer_service_pb2_grpc as pb_grpc
from baton_runtime.config import config_file, load
from baton_runtime.discovery import Discovery, Registration, View, instance_key
from baton_runtime.instance_service import serve_instance
from baton_runtime.lifecycle import Service, run
from baton_runtime.metrics import MetricsServer
from baton_runtime.rpc import GrpcServer
from baton_runtime.telemetry import configure_telemetry

from baton_kvtransfer.books import Books
from baton_kvtransfer.broker import Broker
from baton_kvtransfer.config import KvTransferConfig
from baton_kvtransfer.metrics import BooksCollector
from baton_kvtransfer.service import KvTransferServicer
from baton_kvtransfer.spans import BookSpans

VERSION = importlib.metadata.version("baton-kvtransfer")


class KvTransferService(Service):
    """A kvtransfer process."""

    name = "kvtransfer"
    config: KvTransferConfig
    _registration: Registration
    _servicer: KvTransferServicer

    async def start(self) -> None:
        """Serve, then register: workers find us in discovery and say hello."""
        c = self.config
        telemetry = configure_telemetry(self.name, VERSION, self.instance_id, self.incarnation, c.otlp_endpoint, c.trace_sample_ratio)
        self.closing.push_async_callback(telemetry.close)  # 5: last, it takes the others' spans
        client = Discovery(c.etcd, c.etcd_namespace)
        await client.start()
        self.closing.push_async_callback(client.close)  # 4
        metrics = MetricsServer(advertise=c.advertise)
        metrics_address = await metrics.start(c.metrics_listen)
        self.closing.push_async_callback(metrics.close)  # 3
        view = client.view(discovery.SERVICE_PREFILL, discovery.SERVICE_DECODE)
        books = Books(BookSpans(telemetry.tracer, lambda incarnation: broker.instance_id(incarnation)))
        broker = Broker(books, registered_incarnation=lambda record: _registered_incarnation(view, record))
        BooksCollector(metrics.registry, broker)
        self._servicer = KvTransferServicer(c, broker)
        server = GrpcServer(c.listen, c.advertise)
        pb_grpc.add_KvTransferServiceServicer_to_server(self._servicer, server.server)
        serve_instance(self, server)
        address = await server.start()
        self.closing.push_async_callback(server.close)  # 2
        self.closing.callback(self._servicer.drain)  # 1: first, streams do not end by themselves
        for work, name in ((self._servicer.run(), "books clock"), (self._servicer.stall_watch.run(), "stall watch")):
            task = self.tasks.create_task(work, name=name)
            self.closing.callback(task.cancel)
        self.log_ready(grpc_address=address, metrics_address=metrics_address)
        self._registration = await client.register(
            discovery.Instance(
                service=discovery.SERVICE_KVTRANSFER,
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
        """Leave discovery. Nothing to finish: nobody waits for the books, and the next replica gets snapshots."""
        await self._registration.revoke()
        self._servicer.drain()


def _registered_incarnation(view: View, record: discovery.Instance) -> str:
    registered = view.instances.get(instance_key(record))
    return registered.incarnation if registered is not None and not view.is_gone(registered) else ""


def main() -> None:
    """Entry point of `baton-kvtransfer`."""
    file = config_file("kvtransfer", version=VERSION)
    run(lambda: KvTransferService(load(KvTransferConfig, "kvtransfer", file)))


if __name__ == "__main__":
    main()
