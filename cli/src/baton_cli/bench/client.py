"""One process of the load client: an epoll loop over plain sockets, no task and no thread per stream."""

import errno
import json
import random
import select
import socket
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, TypeAlias

from baton_cli.bench.figures import Figures
from baton_cli.bench.response import Answer, BadResponse, Response

READ_BYTES = 1 << 16
POLL_S = 0.2
PAUSE_S = 0.2  # before a connection that could not be made, or was refused, is used again
_CLOSED = ("broken", "econnreset", "epipe")
_IP_BIND_ADDRESS_NO_PORT = 24  # Linux: choose the port when connecting, so that one address has as many ports as there are destinations
_IN, _OUT = select.EPOLLIN | select.EPOLLHUP | select.EPOLLERR, select.EPOLLOUT


Address: TypeAlias = tuple[int, Any]  # family, socket address


@dataclass(frozen=True)
class Prompt:
    """One request to send, and the answer it must get. text: None: not known; then only the end is checked."""

    body: bytes
    text: str | None
    max_tokens: int


@dataclass(frozen=True)
class Load:
    """What one process does.

    addresses: (family, address) of the server, as sockets take them, in turn; sources: our own addresses to connect from, in turn, none:
    the system's choice; connections: at a time; open_per_s: at which they are opened, 0: at once.
    requests: in all, None: no limit; duration_s: no request is started later; answer_limit_s: a request that takes longer is hung.
    """

    addresses: Sequence[Address]
    path: str
    headers: str
    prompts: Sequence[Prompt]
    connections: int
    open_per_s: float
    requests: int | None
    duration_s: float
    answer_limit_s: float
    seed: int
    sources: Sequence[str] = ()


class _Stream:
    """One connection and the request on it."""

    __slots__ = ("address", "is_reused", "out", "prompt", "response", "sent_at", "sock", "source")

    def __init__(self, address: Address, source: str) -> None:
        self.address = address
        self.source = source  # empty: any
        self.is_reused = False  # its connection had a request before
        self.sock: socket.socket | None = None
        self.out = b""
        self.prompt: Prompt | None = None
        self.response = Response()
        self.sent_at = 0.0


class Client:
    """Keeps every connection busy with one request after another until the load is over."""

    def __init__(self, load: Load, clock: Callable[[], float] = time.monotonic) -> None:
        self.figures = Figures()
        self._load = load
        self._clock = clock
        self._random = random.Random(load.seed)
        self._epoll = select.epoll()
        self._streams: dict[int, _Stream] = {}
        self._idle: deque[tuple[float, _Stream]] = deque()  # (not before, stream), in that order
        self._num_opened = 0
        self._began = 0.0

    def run(self, tell: Callable[[Figures], None], is_stopped: Callable[[], bool]) -> None:
        """Until the last answer. tell: called about twice a second; is_stopped: start nothing more, wait for what runs."""
        self._began = self._clock()
        cpu_began, told_at, swept_at, asked_at = time.process_time(), self._began, self._began, self._began
        stopped = False
        while True:
            now = self._clock()
            stopped = stopped or self._is_over(now)
            if now - asked_at > 0.1:  # asking costs as much as some reads
                asked_at = now
                stopped = stopped or is_stopped()
            if not stopped:
                self._open_more(now)
                self._wake_idle(now)
            elif not self._streams:
                break
            timeout_s = POLL_S if self._num_opened == self._load.connections and not self._idle else 0.005
            for fd, mask in self._epoll.poll(timeout_s, 1024):
                self._on_event(fd, mask, stopped)
            self.figures.most_open = max(self.figures.most_open, len(self._streams))
            if now - swept_at > 1.0:
                swept_at = now
                self._sweep(now)
            if now - told_at > 0.5:
                told_at = now
                self.figures.cpu_s = time.process_time() - cpu_began
                tell(self.figures)
        for _, stream in self._idle:
            self._close(stream)
        self.figures.cpu_s = time.process_time() - cpu_began
        tell(self.figures)

    def _is_over(self, now: float) -> bool:
        return now - self._began >= self._load.duration_s or self._has_enough()

    def _has_enough(self) -> bool:
        return self._load.requests is not None and self.figures.started >= self._load.requests

    # Connections.

    def _open_more(self, now: float) -> None:
        load = self._load
        due = load.connections if not load.open_per_s else min(load.connections, int((now - self._began) * load.open_per_s) + 1)
        # A share at a time, so that answers are read meanwhile.
        for _ in range(min(due - self._num_opened, 256)):
            number = self._num_opened
            source = load.sources[number // len(load.addresses) % len(load.sources)] if load.sources else ""
            stream = _Stream(load.addresses[number % len(load.addresses)], source)
            self._num_opened += 1
            self._begin(stream)

    def _wake_idle(self, now: float) -> None:
        while self._idle and self._idle[0][0] <= now and not self._is_over(now):
            self._begin(self._idle.popleft()[1])

    def _begin(self, stream: _Stream) -> None:
        """Send the next request, on a new connection if there is none."""
        if self._has_enough():
            return self._close(stream)
        stream.prompt = self._random.choice(self._load.prompts)
        stream.sent_at = self._clock()
        self.figures.started += 1
        self._send(stream)

    def _send(self, stream: _Stream) -> None:
        prompt = stream.prompt
        assert prompt is not None
        head = f"POST {self._load.path} HTTP/1.1\r\n{self._load.headers}Content-Length: {len(prompt.body)}\r\n\r\n"
        stream.out, stream.response = head.encode() + prompt.body, Response()
        stream.is_reused = stream.sock is not None
        if stream.sock is None:
            try:
                self._connect(stream)
            except OSError as error:
                return self._end(stream, _name(error), stopped=False)
        assert stream.sock is not None
        self._streams[stream.sock.fileno()] = stream
        self._epoll.register(stream.sock.fileno(), _IN | _OUT)

    @staticmethod
    def _connect(stream: _Stream) -> None:
        family, address = stream.address
        sock = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if stream.source:
            if family == socket.AF_INET:
                sock.setsockopt(socket.IPPROTO_IP, _IP_BIND_ADDRESS_NO_PORT, 1)
            try:
                sock.bind((stream.source, 0))
            except OSError:
                sock.close()
                raise
        code = sock.connect_ex(address)
        if code not in (0, errno.EINPROGRESS):
            sock.close()
            raise OSError(code, errno.errorcode.get(code, str(code)))
        stream.sock = sock

    @staticmethod
    def _close(stream: _Stream) -> None:
        if stream.sock is not None:
            stream.sock.close()
            stream.sock = None

    # Events.

    def _on_event(self, fd: int, mask: int, stopped: bool) -> None:
        stream = self._streams.get(fd)
        if stream is None or stream.sock is None:
            return
        try:
            if mask & _OUT and stream.out:
                sent = stream.sock.send(stream.out)
                stream.out = stream.out[sent:]
                if not stream.out:
                    self._epoll.modify(fd, _IN)
            if mask & _IN:
                self._on_readable(stream, stopped)
        except BlockingIOError:
            return
        except OSError as error:
            self._break(stream, _name(error), stopped)
        except BadResponse as error:
            self._note(f"bad response: {error}")
            self._break(stream, "bad_response", stopped)

    def _on_readable(self, stream: _Stream, stopped: bool) -> None:
        assert stream.sock is not None
        data = stream.sock.recv(READ_BYTES)
        self.figures.num_bytes += len(data)
        if data:
            if stream.response.feed(data, self._clock()):
                self._complete(stream, stopped)
        elif stream.response.ended():
            self._complete(stream, stopped)
        else:
            self._break(stream, "broken", stopped)

    def _complete(self, stream: _Stream, stopped: bool) -> None:
        now, response = self._clock(), stream.response
        answer = response.answer()
        if not response.keeps_alive or stream.out:  # an answer before all of the request was read: the rest would be taken for the next one
            self._forget(stream)
            self._close(stream)
        end = self._judge(stream, answer, now)
        self._end(stream, end, stopped)

    def _break(self, stream: _Stream, why: str, stopped: bool) -> None:
        self._forget(stream)
        self._close(stream)
        if stream.is_reused and not stream.response.has_begun and why in _CLOSED:
            # As any HTTP client does: most likely the server had closed the idle connection. It may have died over the request as well, so
            # the report says how often this happened.
            self.figures.reconnects += 1
            return self._send(stream)
        self._end(stream, why, stopped)

    def _judge(self, stream: _Stream, answer: Answer, now: float) -> str:
        """Count a whole answer. Returns: how it ended."""
        figures, prompt = self.figures, stream.prompt
        assert prompt is not None
        times = answer.event_times
        if times:
            figures.first_s.add(times[0] - stream.sent_at)
            figures.events += len(times)
            for before, at in pairwise(times):
                figures.gap_s.add(at - before)
                figures.same_read += at == before
        if answer.status == 429:
            figures.refused_s.add(now - stream.sent_at)
            figures.without_retry_after += not answer.retry_after
        if answer.error:
            return answer.error
        figures.total_s.add(now - stream.sent_at)
        figures.without_usage += answer.completion_tokens is None
        figures.tokens += answer.completion_tokens if answer.completion_tokens is not None else prompt.max_tokens
        if len(answer.finish_reasons) != 1 or not answer.is_done:
            self._note(f"{len(answer.finish_reasons)} finish reasons, {'an end' if answer.is_done else 'no end'}")
            return "no_single_end"
        if prompt.text is not None and answer.text != prompt.text:
            self._note(f"wrong text: {_difference(answer.text, prompt.text)}")
            return "wrong_text"
        if answer.finish_reasons[0] == "length" and answer.completion_tokens not in (None, prompt.max_tokens):
            self._note(f"{answer.completion_tokens} tokens instead of {prompt.max_tokens}")
            return "wrong_length"
        return "complete"

    def _end(self, stream: _Stream, end: str, stopped: bool) -> None:
        """The one end of a request; the connection's next one follows, after a pause if this one was no answer."""
        self._forget(stream)
        self.figures.ends[end] += 1
        stream.prompt = None
        now = self._clock()
        if stopped or self._is_over(now):
            self._close(stream)
        elif end == "complete":
            self._begin(stream)
        else:
            self._idle.append((now + PAUSE_S, stream))

    def _forget(self, stream: _Stream) -> None:
        if stream.sock is not None and self._streams.pop(stream.sock.fileno(), None) is not None:
            self._epoll.unregister(stream.sock.fileno())

    def _sweep(self, now: float) -> None:
        """Give up on what hangs."""
        for stream in [stream for stream in self._streams.values() if now - stream.sent_at > self._load.answer_limit_s]:
            self._note(f"no end within {self._load.answer_limit_s:g} s")
            self._break(stream, "hung", stopped=False)

    def _note(self, problem: str) -> None:
        if len(self.figures.problems) < 20:
            self.figures.problems.append(problem)


def _name(error: OSError) -> str:
    return errno.errorcode.get(error.errno or 0, type(error).__name__).lower()


def _difference(found: str, wanted: str) -> str:
    at = next((i for i, (one, other) in enumerate(zip(found, wanted, strict=False)) if one != other), min(len(found), len(wanted)))
    return f"from character {at}: {json.dumps(found[at : at + 30])} instead of {json.dumps(wanted[at : at + 30])}"
