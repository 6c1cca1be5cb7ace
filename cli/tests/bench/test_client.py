"""The client against a server that answers as it is told, over real sockets."""

import asyncio
import json
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager

from baton_cli.bench.client import Client, Load, Prompt
from baton_cli.bench.figures import Figures

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"


def chunk(event: dict | str) -> bytes:
    data = f"data: {event if isinstance(event, str) else json.dumps(event)}\n\n".encode()
    return b"%x\r\n%b\r\n" % (len(data), data)


def says(text: str, reason: str | None = None) -> dict:
    return {"choices": [{"index": 0, "delta": {"content": text}, "finish_reason": reason}]}


WHOLE = [HEAD, *(chunk(says(word)) for word in ("one ", "two ", "three")), chunk(says("", "length")), chunk("[DONE]"), b"0\r\n\r\n"]


@contextmanager
def serving(*answers: list[bytes] | None, callers: list[str] | None = None) -> Iterator[tuple[str, int]]:
    """A server that gives these answers in turn, the last one for ever; None: none at all, b"" in one: the connection is closed there.

    callers: gets the address each connection came from.
    """
    left = list(answers)
    started: Future[tuple[asyncio.AbstractEventLoop, asyncio.Event, tuple[str, int]]] = Future()

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if callers is not None:
            callers.append(writer.get_extra_info("peername")[0])
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                length = next(int(line.split(b":")[1]) for line in head.split(b"\r\n") if line.lower().startswith(b"content-length"))
                await reader.readexactly(length)
                answer = left.pop(0) if len(left) > 1 else left[0]
                if answer is None:
                    await asyncio.sleep(60)
                    return
                for piece in answer:
                    if not piece:
                        return
                    writer.write(piece)
                    await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    async def serve() -> None:
        over = asyncio.Event()
        server = await asyncio.start_server(handle, "127.0.0.1", 0)
        started.set_result((asyncio.get_running_loop(), over, server.sockets[0].getsockname()))
        await over.wait()
        server.close()

    thread = threading.Thread(target=asyncio.run, args=(serve(),))
    thread.start()
    loop, over, address = started.result(5)
    try:
        yield address
    finally:
        loop.call_soon_threadsafe(over.set)
        thread.join(5)


def load(address: tuple[str, int], **changes: object) -> Figures:
    """What a client of that server counts."""
    given = {
        "addresses": [(socket.AF_INET, address)],
        "path": "/v1/chat/completions",
        "headers": "Host: x\r\n",
        "prompts": [Prompt(b"{}", "one two three", 3)],
        "connections": 1,
        "open_per_s": 0.0,
        "requests": 1,
        "duration_s": 5.0,
        "answer_limit_s": 5.0,
        "seed": 1,
    }
    client = Client(Load(**{**given, **changes}))
    client.run(lambda figures: None, lambda: False)
    return client.figures


def test_whole_answers_are_counted_with_their_tokens_and_gaps() -> None:
    with serving(WHOLE) as address:
        figures = load(address, requests=20, connections=4)
    assert (figures.started, figures.ended, figures.complete, figures.tokens, figures.events) == (20, 20, 20, 60, 60)
    assert (figures.first_s.count, figures.gap_s.count, figures.total_s.count) == (20, 40, 20)
    assert figures.problems == []


def test_connections_come_from_each_address_in_turn() -> None:
    callers: list[str] = []
    with serving(WHOLE, callers=callers) as address:
        figures = load(address, requests=6, connections=6, sources=("127.0.0.1", "127.0.0.2", "127.0.0.3"))
    assert figures.complete == 6
    assert sorted(callers) == ["127.0.0.1", "127.0.0.1", "127.0.0.2", "127.0.0.2", "127.0.0.3", "127.0.0.3"]


def test_an_address_that_is_not_ours_is_an_end_by_name() -> None:
    with serving(WHOLE) as address:
        assert load(address, sources=("192.0.2.1",)).ends == {"eaddrnotavail": 1}


def test_a_missing_token_is_found_by_its_text() -> None:
    with serving([WHOLE[0], WHOLE[1], *WHOLE[3:]]) as address:
        figures = load(address)
    assert figures.ends == {"wrong_text": 1}
    assert figures.problems == ['wrong text: from character 5: "hree" instead of "wo three"']


def test_two_ends_are_none() -> None:
    with serving([*WHOLE[:4], WHOLE[4], WHOLE[4], *WHOLE[5:]]) as address:
        assert load(address).ends == {"no_single_end": 1}


def test_a_refusal_is_an_answer_and_the_connection_goes_on() -> None:
    body = b'{"error":{"code":"queue_full"}}'
    refusal = [b"HTTP/1.1 429 Too Many Requests\r\nRetry-After: 1\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)]
    with serving(refusal, WHOLE) as address:
        figures = load(address, requests=3)
    assert figures.ends == {"queue_full": 1, "complete": 2}
    assert (figures.refused_s.count, figures.without_retry_after) == (1, 0)


def test_a_connection_that_breaks_off_is_one_broken_request() -> None:
    with serving([*WHOLE[:3], b""], WHOLE) as address:
        figures = load(address, requests=3)
    assert figures.ends == {"broken": 1, "complete": 2}


def test_a_kept_connection_the_server_closed_is_made_anew_and_counts_nothing() -> None:
    with serving([*WHOLE, b""]) as address:
        figures = load(address, requests=3)
    assert figures.ends == {"complete": 3}
    assert (figures.started, figures.reconnects) == (3, 2)


def test_a_stream_that_says_it_has_fewer_tokens_is_wrong_even_if_nobody_knows_its_text() -> None:
    usage = chunk({"choices": [], "usage": {"completion_tokens": 2}})
    with serving([*WHOLE[:5], usage, *WHOLE[5:]]) as address:
        figures = load(address, prompts=[Prompt(b"{}", None, 3)])
    assert figures.ends == {"wrong_length": 1}
    assert figures.without_usage == 0


def test_a_broken_character_is_a_bad_response() -> None:
    data = b'data: {"choices":[{"index":0,"delta":{"content":"\xe2\x82"}}]}\n\n'
    with serving([HEAD, b"%x\r\n%b\r\n" % (len(data), data), *WHOLE[4:]], WHOLE) as address:
        figures = load(address, requests=2)
    assert figures.ends == {"bad_response": 1, "complete": 1}


def test_a_request_without_an_answer_is_given_up() -> None:
    with serving(None) as address:
        figures = load(address, answer_limit_s=0.3)
    assert figures.ends == {"hung": 1}


def test_a_server_that_is_not_there_is_named() -> None:
    with serving(WHOLE) as address:
        pass
    assert load(address, requests=2).ends == {"econnrefused": 2}


def test_connections_open_at_the_rate_asked_for() -> None:
    with serving(WHOLE[:2]) as address:  # nobody is answered, so each stays open
        figures = load(address, connections=100, requests=None, open_per_s=50.0, duration_s=1.0, answer_limit_s=0.5)
    assert 40 <= figures.started <= 60
