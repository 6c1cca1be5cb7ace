"""The load client of bench/stream_beside_peer.py against a server that answers as it is told: what it counts, what it does not accept."""

import json
import shutil
import socket
import struct
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "bench"))
from stream_load import Load, Measured, build, run

UNKNOWN = 0xFFFFFFFF
BODY = b'{"stamp": "aaaaaaaaaaaaaaaa"}'
REQUEST = b"POST / HTTP/1.1\r\nContent-Length: %d\r\n\r\n%b" % (len(BODY), BODY)
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
DONE = b"data: [DONE]\n\n"
pytestmark = [pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler"), pytest.mark.timeout(60)]


def event(text: str, reason: str | None = None, *, as_ascii: bool = True) -> bytes:
    logprobs = {"content": [{"token": text, "logprob": -1.0}]}
    choice = {"index": 0, "logprobs": logprobs, "delta": {"content": text}, "finish_reason": reason}
    return b"data: %b\n\n" % json.dumps({"choices": [choice]}, ensure_ascii=as_ascii).encode()


def usage(tokens: int) -> bytes:
    return b'data: {"choices": [], "usage": {"completion_tokens": %d}}\n\n' % tokens


def chunked(*events: bytes) -> bytes:
    return HEAD + b"".join(b"%x\r\n%b\r\n" % (len(data), data) for data in events) + b"0\r\n\r\n"


ENDED = (event("", "length"), usage(3), DONE)
RIGHT = chunked(event('say "é'), event("😀\n"), event("ü", as_ascii=False), *ENDED)
TEXT = 'say "é😀\nü'


@contextmanager
def serving(*answers: bytes) -> Iterator[tuple[int, list[bytes]]]:
    """Gives these answers in turn on whatever connection asks, the last one for ever. Yields the port and the bodies it was sent."""
    asked: list[bytes] = []
    left = list(answers)

    def serve(connection: socket.socket) -> None:
        with connection:
            while len(data := connection.recv(len(REQUEST), socket.MSG_WAITALL)) == len(REQUEST):
                asked.append(data.partition(b"\r\n\r\n")[2])
                answer = left.pop(0) if len(left) > 1 else left[0]
                connection.sendall(answer)
                if b"connection: close" in answer.lower():
                    return

    def accept() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=serve, args=(connection,), daemon=True).start()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=accept, daemon=True).start()
        try:
            yield listener.getsockname()[1], asked
        finally:
            listener.shutdown(socket.SHUT_RDWR)


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("client"))


def load(program: Path, folder: Path, *answers: bytes, requests: int = 1, check_every: int = 1) -> tuple[Measured, list[bytes]]:
    """One connection, one prompt with a known answer and one with a stamp."""
    prompts = folder / "prompts"
    known = struct.pack("<5I", len(REQUEST), len(TEXT.encode()), 0, 3, 0) + REQUEST + TEXT.encode()
    unknown = struct.pack("<5I", len(REQUEST), UNKNOWN, REQUEST.index(b"aaaa"), 3, 0) + REQUEST
    prompts.write_bytes(known + unknown)
    with serving(*answers) as (port, asked):
        measured = run(program, "127.0.0.1", port, prompts, 0, Load(1, 10.0, requests, check_every=check_every), {})
    return measured, asked


def test_right_answers_are_counted_with_their_tokens_and_events(program: Path, tmp_path: Path) -> None:
    measured, _ = load(program, tmp_path, RIGHT, requests=5)
    figures = measured.figures
    assert figures.ends == {"complete": 5}, figures.problems
    assert (figures.tokens, figures.events, measured.texts_checked) == (15, 15, 5)
    assert (figures.first_s.count, figures.gap_s.count, figures.total_s.count, measured.per_token_s.count) == (5, 10, 5, 5)


def test_an_answer_without_streaming_is_checked_too(program: Path, tmp_path: Path) -> None:
    content = {"choices": [{"message": {"content": TEXT}, "finish_reason": "length"}], "usage": {"completion_tokens": 3}}
    body = json.dumps(content).encode()
    measured, _ = load(program, tmp_path, b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body))
    assert measured.figures.ends == {"complete": 1}, measured.figures.problems


def test_prompts_with_a_stamp_all_differ_and_those_with_an_answer_do_not(program: Path, tmp_path: Path) -> None:
    measured, asked = load(program, tmp_path, RIGHT, requests=8, check_every=4)
    assert measured.figures.complete == 8
    assert measured.texts_checked == 2
    assert asked.count(BODY) == 2
    assert len(set(asked)) == 7


@pytest.mark.parametrize(
    ("answer", "end"),
    [
        (chunked(event("say"), event("😀\n"), event("ü"), *ENDED), "wrong_text"),
        (chunked(event(TEXT), *ENDED, event("more")), "wrong_text"),
        (chunked(event(TEXT), usage(3), DONE), "no_single_end"),
        (chunked(event(TEXT), event("", "length"), event("", "length"), usage(3), DONE), "no_single_end"),
        (chunked(event(TEXT), event("", "length"), usage(3)), "no_single_end"),
        (chunked(event(TEXT), event("", "length"), usage(2), DONE), "wrong_length"),
        (chunked(event(TEXT), event("", "stop"), usage(3), DONE), "wrong_length"),
        (chunked(event(TEXT), b'data: {"error": {"message": "gone", "code": "engine_crash"}}\n\n'), "engine_crash"),
        (b"HTTP/1.1 429 Too Many Requests\r\nRetry-After: 1\r\nContent-Length: 0\r\n\r\n", "http_429"),
        (HEAD + b"nonsense\r\n0\r\n\r\n", "bad_response"),
        (HEAD.replace(b"chunked\r\n", b"chunked\r\nConnection: close\r\n") + b"5\r\ndata:", "broken"),
    ],
)
def test_a_wrong_answer_is_not_complete(program: Path, tmp_path: Path, answer: bytes, end: str) -> None:
    measured, _ = load(program, tmp_path, answer)
    assert measured.figures.ends == {end: 1}, measured.figures.problems
    assert measured.wrong == 1


def test_a_kept_connection_that_was_closed_is_opened_again(program: Path, tmp_path: Path) -> None:
    closing = RIGHT.replace(b"chunked\r\n", b"chunked\r\nConnection: close\r\n", 1)
    measured, _ = load(program, tmp_path, closing, RIGHT, requests=3)
    assert measured.figures.ends == {"complete": 3}, measured.figures.problems
