"""Workers and routers for tests: real gRPC servers in this process, whose failures the test commands.

A FakeWorker runs its sequences one token per step; a token is a function of all tokens before it, so that a resumed sequence
must go on exactly as an undisturbed one would have.
"""

import asyncio
import zlib
from array import array
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import grpc
from baton_contracts.discovery.v1 import instance_pb2
from baton_contracts.router.v1 import router_service_pb2 as router_pb2
from baton_contracts.router.v1 import router_service_pb2_grpc as router_grpc
from baton_contracts.worker.v1 import worker_service_pb2 as worker_pb2
from baton_contracts.worker.v1 import worker_service_pb2_grpc as worker_grpc
from grpc.aio import EOF  # type: ignore[attr-defined]  # missing in the stubs
from grpc_health.v1 import health_pb2, health_pb2_grpc

VOCAB_SIZE = 256


def next_token(token_ids: "array[int]") -> int:
    """What follows these tokens."""
    return zlib.crc32(token_ids.tobytes()) % VOCAB_SIZE


def expected_output(prompt: "array[int]", num_tokens: int) -> list[int]:
    """Undisturbed output of a prompt."""
    tokens = array("I", prompt)
    for _ in range(num_tokens):
        tokens.append(next_token(tokens))
    return tokens[len(prompt) :].tolist()


class FakeSequence:
    """One Start the worker has taken."""

    def __init__(self, start: worker_pb2.Start) -> None:
        self.start = start
        self.tokens = array("I", start.token_ids)
        self.sent = len(self.tokens) - start.num_prompt_tokens  # next position to send
        self.drawn = 0
        self.finished: worker_pb2.Finished | None = None  # decided, perhaps not sent yet

    @property
    def position(self) -> int:
        """Output tokens there are."""
        return len(self.tokens) - self.start.num_prompt_tokens

    @property
    def is_prefill(self) -> bool:
        """Whether it draws nothing."""
        return self.start.HasField("prefill_for")

    def step(self) -> None:
        """Draw one token, or end."""
        if self.finished is not None:
            return
        if self.is_prefill:
            self.end(worker_pb2.FINISH_REASON_PREFILLED)
            return
        self.tokens.append(next_token(self.tokens))
        self.drawn += 1
        if self.position >= self.start.sampling.max_tokens:
            self.end(worker_pb2.FINISH_REASON_LENGTH)

    def end(self, reason: worker_pb2.FinishReason, **fields: Any) -> None:
        """Decide the end, once."""
        if self.finished is None:
            usage = worker_pb2.Usage(input_tokens=len(self.start.token_ids) // 4, output_tokens=self.drawn)
            self.finished = worker_pb2.Finished(slot=self.start.slot, reason=reason, usage=usage, **fields)


class FakeWorker(worker_grpc.WorkerServiceServicer):
    """A prefill or decode instance. Steps only while `is_running`."""

    def __init__(
        self,
        instance_id: str,
        incarnation: str,
        *,
        service: instance_pb2.Service = instance_pb2.SERVICE_DECODE,
        step_s: float = 0.005,
        model: instance_pb2.Model | None = None,
    ) -> None:
        self.instance_id = instance_id
        self.incarnation = incarnation
        self.service = service
        self.step_s = step_s
        self.model = model or instance_pb2.Model(
            served_name="m", fingerprint="f" * 16, path="/m", hash_block_tokens=16, max_model_tokens=4096, vocab_size=VOCAB_SIZE
        )
        self.address = ""
        self.is_running = True  # steps are made
        self.is_silent = False  # not even beats are sent
        self.step_age_us = 0
        self.keeps_sequences = True  # over a broken stream
        self.refuse_with: worker_pb2.FinishReason | None = None  # answer to every Start
        self.sequences: dict[int, FakeSequence] = {}
        self.starts: list[worker_pb2.Start] = []
        self.cancels: list[worker_pb2.Cancel] = []
        self.requests: list[worker_pb2.AttachRequest] = []  # everything received, hellos included
        self.sessions = 0
        self.merge_every = 1  # steps per frame
        self._step = 0
        self._frame = 0
        self._break: asyncio.Event = asyncio.Event()
        self._changed: asyncio.Event = asyncio.Event()
        self._server: grpc.aio.Server | None = None

    @property
    def instance(self) -> instance_pb2.Instance:
        """Its record."""
        return instance_pb2.Instance(
            service=self.service,
            instance_id=self.instance_id,
            incarnation=self.incarnation,
            grpc_address=self.address,
            model=self.model,
        )

    async def open(self, address: str = "127.0.0.1:0") -> "FakeWorker":
        """Serve."""
        self._server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
        worker_grpc.add_WorkerServiceServicer_to_server(self, self._server)
        port = self._server.add_insecure_port(address)
        await self._server.start()
        self.address = f"127.0.0.1:{port}"
        return self

    async def close(self) -> None:
        """As kill -9: streams are reset, nobody listens any more. Idempotent."""
        server, self._server = self._server, None
        if server is not None:
            await server.stop(0)

    def break_streams(self) -> None:
        """Every stream ends; the server goes on."""
        self._break.set()
        self._break = asyncio.Event()

    async def until(self, condition: Callable[[], bool], timeout_s: float = 5.0) -> None:
        """Wait until something the worker received or did makes the condition true."""
        async with asyncio.timeout(timeout_s):
            while not condition():
                self._changed.clear()
                await self._changed.wait()

    async def Attach(self, request_iterator: Any, context: Any) -> None:
        """One session."""
        hello = await context.read()
        self._on_hello(hello)
        with suppress(ExceptionGroup):
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._read(context))
                tasks.create_task(self._end_when(self._break))
                await self._write(context)

    def _on_hello(self, message: worker_pb2.AttachRequest) -> None:
        self.requests.append(message)
        self.sessions += 1
        self._frame = 0
        wanted = {resume.slot: resume for resume in message.hello.resumes}
        self.sequences = {slot: s for slot, s in self.sequences.items() if slot in wanted and self.keeps_sequences}
        for slot, resume in wanted.items():
            sequence = self.sequences.get(slot)
            if sequence is None:
                sequence = self.sequences[slot] = FakeSequence(worker_pb2.Start(slot=slot, request_id=resume.request_id))
                sequence.end(worker_pb2.FINISH_REASON_UNKNOWN)
            sequence.sent = resume.next_position
        self._changed.set()

    async def _read(self, context: Any) -> None:
        while (message := await context.read()) is not EOF:
            self.requests.append(message)
            for cancel in message.cancels:
                self.cancels.append(cancel)
                for sequence in self.sequences.values():
                    if sequence.start.request_id == cancel.request_id and sequence.start.attempt <= cancel.attempt:
                        sequence.end(worker_pb2.FINISH_REASON_CANCELLED)
            for start in message.starts:
                self.starts.append(start)
                sequence = self.sequences[start.slot] = FakeSequence(start)
                if self.refuse_with is not None:
                    sequence.end(self.refuse_with, error=worker_pb2.ErrorDetail(reason="TEST", retry_after_ms=20))
            self._changed.set()
        raise ConnectionResetError

    async def _end_when(self, event: asyncio.Event) -> None:
        await event.wait()
        raise ConnectionResetError

    async def _write(self, context: Any) -> None:
        await context.write(self._next_frame(welcome=True))
        while True:
            await asyncio.sleep(self.step_s * self.merge_every)
            if self.is_running:
                for _ in range(self.merge_every):
                    self._step += 1
                    for sequence in self.sequences.values():
                        sequence.step()
                self._changed.set()
            if not self.is_silent:
                await context.write(self._next_frame())

    def _next_frame(self, *, welcome: bool = False) -> worker_pb2.AttachResponse:
        self._frame += 1
        beat = worker_pb2.Beat(step=self._step, running_step_age_us=self.step_age_us)
        frame = worker_pb2.AttachResponse(frame=self._frame, beat=beat)
        if welcome:
            frame.welcome.CopyFrom(worker_pb2.AttachWelcome(contract_version=1, instance_id=self.instance_id, incarnation=self.incarnation))
            return frame
        slots, positions, token_ids = array("I"), array("I"), array("I")
        for slot, sequence in list(self.sequences.items()):
            for position in range(sequence.sent, sequence.position):
                slots.append(slot)
                positions.append(position)
                token_ids.append(sequence.tokens[sequence.start.num_prompt_tokens + position])
            sequence.sent = max(sequence.sent, sequence.position)
            if sequence.finished is not None:
                frame.finished.append(sequence.finished)
                del self.sequences[slot]
        frame.slots, frame.positions, frame.token_ids = slots.tobytes(), positions.tobytes(), token_ids.tobytes()
        return frame


class FakeRouter(router_grpc.RouterServiceServicer):
    """A router that answers as `place` says; None keeps the question open."""

    def __init__(self, instance_id: str, place: Callable[[router_pb2.Query], router_pb2.Answer | None]) -> None:
        self.instance_id = instance_id
        self.incarnation = f"{instance_id}-1"
        self.place = place
        self.address = ""
        self.is_stopped = False  # answers nothing at all, not even its health
        self.requests: list[router_pb2.RouteRequest] = []
        self._changed = asyncio.Event()
        self._server: grpc.aio.Server | None = None

    @property
    def instance(self) -> instance_pb2.Instance:
        """Its record."""
        return instance_pb2.Instance(
            service=instance_pb2.SERVICE_ROUTER, instance_id=self.instance_id, incarnation=self.incarnation, grpc_address=self.address
        )

    @property
    def queries(self) -> list[router_pb2.Query]:
        """All questions so far."""
        return [query for request in self.requests for query in request.queries]

    async def open(self, address: str = "127.0.0.1:0") -> "FakeRouter":
        """Serve."""
        self._server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
        router_grpc.add_RouterServiceServicer_to_server(self, self._server)
        health_pb2_grpc.add_HealthServicer_to_server(_Health(self), self._server)
        port = self._server.add_insecure_port(address)
        await self._server.start()
        self.address = f"127.0.0.1:{port}"
        return self

    async def close(self) -> None:
        """As kill -9. Idempotent."""
        server, self._server = self._server, None
        if server is not None:
            await server.stop(0)

    async def until(self, condition: Callable[[], bool], timeout_s: float = 5.0) -> None:
        """Wait until something the router received makes the condition true."""
        async with asyncio.timeout(timeout_s):
            while not condition():
                self._changed.clear()
                await self._changed.wait()

    async def Route(self, request_iterator: Any, context: Any) -> None:
        """One stream."""
        while (request := await context.read()) is not EOF:
            self.requests.append(request)
            self._changed.set()
            answers = [] if self.is_stopped else [answer for query in request.queries if (answer := self.place(query)) is not None]
            if answers:
                await context.write(router_pb2.RouteResponse(answers=answers))


class _Health(health_pb2_grpc.HealthServicer):  # type: ignore[misc]  # untyped
    def __init__(self, router: FakeRouter) -> None:
        self._router = router

    async def Check(self, request: Any, context: Any) -> health_pb2.HealthCheckResponse:
        if self._router.is_stopped:
            await asyncio.Event().wait()
        return health_pb2.HealthCheckResponse(status=health_pb2.HealthCheckResponse.SERVING)


def placed_on(query_id: int, decode: FakeWorker, prefill: FakeWorker | None = None) -> router_pb2.Answer:
    """The answer that places a request."""
    answer = router_pb2.Answer(query_id=query_id)
    for target, worker in ((answer.placement.decode, decode), (answer.placement.prefill, prefill)):
        if worker is not None:
            target.instance_id, target.incarnation, target.address = worker.instance_id, worker.incarnation, worker.address
    return answer


def refused_with(query_id: int, reason: str, retry_after_ms: int = 0) -> router_pb2.Answer:
    """The answer that refuses one."""
    return router_pb2.Answer(query_id=query_id, refusal=router_pb2.Refusal(reason=reason, message=reason, retry_after_ms=retry_after_ms))
