"""All frontends attached to this worker: one session per incarnation, and whose sequence a token belongs to."""

from baton_contracts.worker.v1 import worker_service_pb2 as pb
from baton_engine.api import SequenceKey, StepOutput
from baton_runtime.errors import InvalidArgument

from baton_worker.attach import CONTRACT_VERSION, AttachLimits, FrontendSession, Routes, SequenceControl, Stream
from baton_worker.attempts import Attempts


class Frontends:
    """Sessions by frontend incarnation. A plain synchronous class: `attach_service` does the I/O, `dispatch` runs the sequences."""

    def __init__(self, instance_id: str, incarnation: str, control: SequenceControl, limits: AttachLimits | None = None) -> None:
        self._welcome = pb.AttachWelcome(contract_version=CONTRACT_VERSION, instance_id=instance_id, incarnation=incarnation)
        self._control = control
        self._limits = limits if limits is not None else AttachLimits()
        self._attempts = Attempts()
        self._routes: Routes = {}
        self._sessions: dict[str, FrontendSession] = {}

    @property
    def sessions(self) -> list[FrontendSession]:
        """Sessions that are attached, or detached and not expired."""
        return list(self._sessions.values())

    @property
    def num_attached(self) -> int:
        """Frontends with an open stream."""
        return sum(session.stream is not None for session in self._sessions.values())

    @property
    def num_live(self) -> int:
        """Sequences whose end has not come."""
        return len(self._routes)

    @property
    def num_unacknowledged(self) -> int:
        """Sequences, live or ended, whose end no frontend has acknowledged."""
        return sum(session.num_sequences for session in self._sessions.values())

    def attach(self, hello: pb.AttachHello, stream: Stream, now: float) -> FrontendSession:
        """The session of this frontend incarnation, attached to stream.

        Raises: StaleSession, InvalidArgument.
        """
        if hello.contract_version < 1:
            raise InvalidArgument("hello.contract_version", "is missing")
        if not hello.incarnation or hello.session < 1:
            raise InvalidArgument("hello.session" if hello.incarnation else "hello.incarnation", "is missing")
        session = self._sessions.get(hello.incarnation)
        if session is None:
            session = FrontendSession(
                hello.instance_id, hello.incarnation, self._welcome, self._control, self._attempts, self._routes, self._limits
            )
        session.attach(hello, stream, now)
        self._sessions[hello.incarnation] = session
        return session

    def on_output(self, output: StepOutput) -> None:
        """Tokens of one step. Those of sequences that are over are dropped. Ends come through `end`, after this."""
        routes, keys, positions, token_ids = self._routes, output.keys, output.positions, output.token_ids
        start, num_tokens = 0, len(keys)
        while start < num_tokens:
            key, end = keys[start], start + 1
            while end < num_tokens and keys[end] is key:
                end += 1
            route = routes.get(key)
            if route is not None:
                route[0].append(route[1], positions[start], token_ids[start:end])
            start = end
        for logprobs in output.logprobs:
            route = routes.get(logprobs.key)
            if route is not None:
                route[0].append_logprobs(route[1], logprobs)
        for session in self._sessions.values():
            if session.stream is not None and session.has_output:
                session.stream.wake()

    def end(self, key: SequenceKey, finished: pb.Finished, now: float) -> None:
        """The one end of a sequence. A second one is ignored."""
        route = self._routes.get(key)
        if route is not None:
            route[0].end(route[1], finished, now)

    def tick(self, now: float) -> None:
        """Act on what the clock alone says. To be called at least every 100 ms."""
        for incarnation, session in list(self._sessions.items()):
            session.tick(now)
            if session.is_expired:
                del self._sessions[incarnation]
        self._attempts.expire(now)

    def fence_all(self, now: float) -> None:
        """Our own loop stood still: every stream is broken, before anything of it is looked at."""
        for session in self._sessions.values():
            session.fence(now)
        self.tick(now)

    def end_all(self, finished: pb.Finished, now: float) -> None:
        """Nothing runs any more (the engine died): every live sequence ends like this."""
        for key in list(self._routes):
            copy = pb.Finished()
            copy.CopyFrom(finished)
            self.end(key, copy, now)
