"""Run a service that speaks as the last release did: `python previous_release.py MODULE`.

Every message it sends or receives over gRPC goes through the descriptor image the release left in proto/releases: a field that image
does not know is dropped in both directions, and a call it does not know is not served. So a peer meets what it would meet in a service
built from the contracts of that release. It is today's code: how the old code itself behaved, this does not show. Records in etcd are
not filtered.
"""

import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
from google.protobuf import descriptor_pb2
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass

RELEASES = Path(__file__).parents[1] / "proto" / "releases"
SHAPES = ("unary_unary", "unary_stream", "stream_unary", "stream_stream")
Convert = Callable[[bytes], bytes]


def last_release() -> Path:
    """The newest descriptor image."""
    return max(RELEASES.glob("*.binpb"), key=lambda path: [int(part) for part in path.stem.split(".")])


class Contracts:
    """What a release could say."""

    def __init__(self, image: bytes) -> None:
        pool = DescriptorPool()
        files = descriptor_pb2.FileDescriptorSet.FromString(image)
        for file in files.file:
            pool.Add(file)  # type: ignore[no-untyped-call]
        self._calls: dict[str, tuple[Convert, Convert]] = {}
        self.services = {f"{file.package}.{service.name}" for file in files.file for service in file.service}
        for name in self.services:
            for method in pool.FindServiceByName(name).methods:
                self._calls[f"/{name}/{method.name}"] = (
                    _through(GetMessageClass(method.input_type)),
                    _through(GetMessageClass(method.output_type)),
                )

    def call(self, path: str) -> tuple[Convert, Convert] | None:
        """What becomes of the request's and the response's bytes of a call, e.g. "/baton.worker.v1.WorkerService/Attach"; None: unknown."""
        return self._calls.get(path)


def _through(known: type[Message]) -> Convert:
    def convert(data: bytes) -> bytes:
        message = known.FromString(data)
        message.DiscardUnknownFields()  # type: ignore[no-untyped-call]
        return message.SerializeToString()

    return convert


def restrict(contracts: Contracts) -> None:
    """From now on all channels and servers of this process speak those contracts only."""
    for shape in SHAPES:
        _restrict_channel(contracts, shape)
    make_handler = grpc.method_handlers_generic_handler

    def known_handlers(service: str, handlers: dict[str, Any]) -> grpc.GenericRpcHandler:
        if service.startswith("baton."):
            # In place: the stubs register the same dict a second time.
            for name, handler in list(handlers.items()):
                if (call := contracts.call(f"/{service}/{name}")) is None:
                    del handlers[name]
                else:
                    handlers[name] = handler._replace(
                        request_deserializer=_after(call[0], handler.request_deserializer),
                        response_serializer=_before(call[1], handler.response_serializer),
                    )
        return make_handler(service, handlers)

    grpc.method_handlers_generic_handler = known_handlers


def _restrict_channel(contracts: Contracts, shape: str) -> None:
    channel: Any = grpc.aio._channel.Channel
    make = getattr(channel, shape)

    def known(self: object, method: str, request_serializer: Any = None, response_deserializer: Any = None, *rest: Any, **more: Any) -> Any:
        if (call := contracts.call(method)) is not None:
            request_serializer = _before(call[0], request_serializer)
            response_deserializer = _after(call[1], response_deserializer)
        return make(self, method, request_serializer, response_deserializer, *rest, **more)

    setattr(channel, shape, known)


def _before(convert: Convert, serialize: Callable[[Any], bytes] | None) -> Callable[[Any], bytes]:
    return convert if serialize is None else lambda message: convert(serialize(message))


def _after(convert: Convert, deserialize: Callable[[bytes], Any] | None) -> Callable[[bytes], Any]:
    return convert if deserialize is None else lambda data: deserialize(convert(data))


if __name__ == "__main__":
    restrict(Contracts(last_release().read_bytes()))
    module = sys.argv[1]
    sys.argv = sys.argv[1:]
    runpy.run_module(module, run_name="__main__", alter_sys=True)
