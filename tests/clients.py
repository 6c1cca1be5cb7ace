"""Clients of the cross-service tests: streams whose every token is checked, and a TCP proxy that can be cut."""

import asyncio
import json
from collections.abc import AsyncIterator, Collection
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import aiohttp


@dataclass
class Answer:
    """What a client got of one streamed completion."""

    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    finish_reason: str | None = None
    usage: dict | None = None
    resumed: object = None
    error: dict | None = None
    num_events: int = 0
    progressed: asyncio.Event = field(default_factory=asyncio.Event)


async def stream(http: aiohttp.ClientSession, url: str, answer: Answer | None = None, **body: object) -> Answer:
    """POST /v1/completions with stream and return_token_ids; fills answer as events come, returns it at the end."""
    answer = answer if answer is not None else Answer()
    request = {"stream": True, "return_token_ids": True, "stream_options": {"include_usage": True}, **body}
    async with http.post(f"{url}/v1/completions", json=request) as response:
        assert response.status == 200, await response.text()
        done = False
        async for line in response.content:
            if not line.startswith(b"data: "):
                continue
            data = line[6:].strip()
            if data == b"[DONE]":
                done = True
                break
            _take(answer, json.loads(data))
        assert done, "the stream ended without [DONE]"
    return answer


def _take(answer: Answer, event: dict) -> None:
    answer.num_events += 1
    answer.error = event.get("error", answer.error)
    answer.usage = event.get("usage") or answer.usage
    answer.resumed = event.get("baton", {}).get("resumed", answer.resumed)
    for choice in event.get("choices", ()):
        answer.token_ids += choice.get("token_ids") or []
        answer.text += choice.get("text") or ""
        answer.finish_reason = choice.get("finish_reason") or answer.finish_reason
    answer.progressed.set()


async def received(answer: Answer, num_tokens: int, limit_s: float = 20.0) -> None:
    """Wait until that many tokens have come."""
    async with asyncio.timeout(limit_s):
        while len(answer.token_ids) < num_tokens:
            answer.progressed.clear()
            await answer.progressed.wait()


class Proxy:
    """Forwards TCP from a port of its own to a target set later; can be cut and can refuse."""

    def __init__(self) -> None:
        self.target: tuple[str, int] | None = None
        self.is_open = True
        self._pairs: set[tuple[asyncio.StreamWriter, asyncio.StreamWriter]] = set()  # to the client, to the target
        self._server: asyncio.Server | None = None
        self._port = 0

    @property
    def address(self) -> str:
        """host:port clients connect to."""
        return f"127.0.0.1:{self._port}"

    @property
    def is_listening(self) -> bool:
        """Whether connections are accepted, be it to be reset at once."""
        return self._server is not None

    async def listen(self) -> None:
        """Accept connections; always on the same port."""
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self._port)
        self._port = self._server.sockets[0].getsockname()[1]

    def refuse(self) -> None:
        """Accept none from now on: as if nobody listened there. Idempotent."""
        if self._server is not None:
            self._server.close()
            self._server = None

    def cut(self, client_ports: Collection[int] | None = None) -> int:
        """Reset connections now, all or those from these ports; new ones are served if is_open. Returns how many were cut."""
        cut = [pair for pair in self._pairs if client_ports is None or pair[0].get_extra_info("peername")[1] in client_ports]
        for pair in cut:
            for writer in pair:
                writer.transport.abort()
        return len(cut)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if not self.is_open or self.target is None:
            writer.transport.abort()
            return
        try:
            up_reader, up_writer = await asyncio.open_connection(*self.target)
        except OSError:
            writer.transport.abort()
            return
        pair = writer, up_writer
        self._pairs.add(pair)
        try:
            await asyncio.gather(_copy(reader, up_writer), _copy(up_reader, writer))
        finally:
            self._pairs.discard(pair)
            writer.transport.abort()
            up_writer.transport.abort()


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        while data := await reader.read(1 << 16):
            writer.write(data)
            await writer.drain()
        writer.write_eof()
    except OSError:
        pass  # cut


@asynccontextmanager
async def proxy() -> AsyncIterator[Proxy]:
    """A proxy on a free loopback port."""
    made = Proxy()
    await made.listen()
    try:
        yield made
    finally:
        made.cut()
        made.refuse()
