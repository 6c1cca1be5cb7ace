"""What a response says, however its bytes are cut into reads."""

import pytest
from baton_cli.bench.response import Answer, BadResponse, Response

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
EVENTS = [
    b'data: {"choices":[{"index":0,"delta":{"role":"assistant","content":""}}]}\n\n',
    b'data: {"choices":[{"index":0,"delta":{"content":"on\\u00e9 "}}]}\n\n',
    b'data: {"choices":[{"index":0,"delta":{"content":"two"},"finish_reason":null}]}\n\n',
    b'data: {"choices":[{"index":0,"delta":{},"finish_reason":"length"}],"usage":{"prompt_tokens":3,"completion_tokens":2}}\n\n',
    b"data: [DONE]\n\n",
]


def chunked(*pieces: bytes) -> bytes:
    return b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces) + b"0\r\n\r\n"


def fed(*reads: bytes) -> tuple[Response, list[bool]]:
    """Each read comes one second after the one before."""
    response = Response()
    return response, [response.feed(data, float(number)) for number, data in enumerate(reads)]


def test_events_have_the_time_of_the_read_that_completed_them() -> None:
    response, complete = fed(HEAD, *(b"%x\r\n%b\r\n" % (len(event), event) for event in EVENTS), b"0\r\n\r\n")
    assert complete == [False] * 6 + [True]
    assert response.answer() == Answer(200, "oné two", [2.0, 3.0], ["length"], 2, is_done=True)


@pytest.mark.parametrize("size", [1, 2, 3, 7, 50, 10_000])
def test_the_answer_does_not_depend_on_how_the_bytes_were_cut(size: int) -> None:
    data = HEAD + chunked(*EVENTS)
    response, complete = fed(*(data[at : at + size] for at in range(0, len(data), size)))
    assert complete.index(True) == len(complete) - 1
    answer = response.answer()
    assert (answer.text, answer.finish_reasons, answer.is_done) == ("oné two", ["length"], True)


def test_an_event_over_two_chunks_is_read() -> None:
    whole = b"".join(EVENTS)
    response, _ = fed(HEAD, chunked(whole[:100], whole[100:130], whole[130:]))
    assert response.answer().text == "oné two"


def test_several_events_of_one_read_have_one_time() -> None:
    response, _ = fed(HEAD, chunked(*EVENTS))
    assert response.answer().event_times == [1.0, 1.0]


def test_completions_are_read_as_well_as_chats() -> None:
    event = b'data: {"choices":[{"index":0,"text":"x","finish_reason":"stop"}]}\n\n'
    response, _ = fed(HEAD + chunked(event, EVENTS[-1]))
    assert response.answer().text == "x"


def test_an_answer_without_streaming_has_its_text_at_the_end() -> None:
    body = b'{"choices":[{"index":0,"message":{"content":"all"},"finish_reason":"length"}],"usage":{"completion_tokens":1}}'
    head = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body)
    response, complete = fed(head + body[:20], body[20:])
    assert complete == [False, True]
    assert response.answer() == Answer(200, "all", [1.0], ["length"], 1, is_done=True)
    assert response.keeps_alive


def test_a_refusal_says_when_to_come_back() -> None:
    body = b'{"error":{"message":"full","code":"queue_full"}}'
    response, complete = fed(b"HTTP/1.1 429 Too Many Requests\r\nRetry-After: 1\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body))
    assert complete == [True]
    answer = response.answer()
    assert (answer.status, answer.error, answer.retry_after) == (429, "queue_full", "1")


def test_an_error_in_mid_stream_is_the_end() -> None:
    response, _ = fed(HEAD + chunked(*EVENTS[:2], b'data: {"error":{"message":"gone","code":"engine_crash"}}\n\n', EVENTS[-1]))
    answer = response.answer()
    assert (answer.text, answer.error) == ("oné ", "engine_crash")


def test_an_error_page_of_a_proxy_is_an_error_and_no_crash() -> None:
    response, _ = fed(b"HTTP/1.1 502 Bad Gateway\r\nContent-Length: 6\r\n\r\n<html>")
    assert response.answer().error == "http_502"


def test_a_response_without_length_ends_with_its_connection() -> None:
    response, complete = fed(b"HTTP/1.1 200 OK\r\n\r\n", b'{"choices":[]}')
    assert complete == [False, False]
    assert response.ended()
    assert not fed(HEAD)[0].ended()


def test_what_the_head_says_of_the_connection_is_heeded() -> None:
    tail = b"Content-Length: 2\r\n\r\n{}"
    kept = {b"1.1": (b"", True), b"1.0": (b"", False), b"1.1 ": (b"Connection: x, Close\r\n", False)}
    for version, (connection, keeps_alive) in kept.items():
        response, _ = fed(b"HTTP/%b 200 OK\r\n%b%b" % (version.strip(), connection, tail))
        assert response.keeps_alive is keeps_alive


def test_a_length_that_is_none_is_refused() -> None:
    with pytest.raises(BadResponse, match="length"):
        fed(b"HTTP/1.1 200 OK\r\nContent-Length: 12, 12\r\n\r\n")


@pytest.mark.parametrize("data", [b"SSH-2.0-x\r\n\r\n", HEAD + b"zz\r\n\r\n0\r\n\r\n", HEAD + chunked(b"data: {\n\n")])
def test_what_is_no_response_is_refused_with_what_was_found(data: bytes) -> None:
    with pytest.raises(BadResponse, match=r"SSH|zz|data|truncated"):
        fed(data)[0].answer()
