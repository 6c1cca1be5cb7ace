"""How a load is shared among processes, and what is asked."""

import pytest
from baton_cli.bench.stream import Options, bodies, loads, num_processes
from click import ClickException

URL = ("http://127.0.0.1:1",)


def test_no_process_gets_a_share_of_none() -> None:
    """None of them would ever end: no share would mean no limit."""
    options = Options(URL, requests=3, connections=8, processes=4)
    assert [load.requests for load in loads(options, [], num_processes(options))] == [1, 1, 1]


def test_without_a_number_of_requests_there_is_no_limit() -> None:
    assert [load.requests for load in loads(Options(URL, connections=5), [], 2)] == [None, None]


def test_everything_is_shared() -> None:
    shares = loads(Options(URL, requests=7, connections=5, open_per_s=30.0), [], 2)
    assert [load.connections for load in shares] == [3, 2]
    assert [load.requests for load in shares] == [4, 3]
    assert [load.open_per_s for load in shares] == [15.0, 15.0]


def test_too_few_processes_for_the_connections_are_refused_with_both_numbers() -> None:
    with pytest.raises(ClickException, match=r"--processes 1: .* are needed for 10000000"):
        num_processes(Options(URL, connections=10_000_000, processes=1))


def test_a_host_nobody_knows_is_named() -> None:
    with pytest.raises(ClickException, match=r"--url http://nobody\.invalid"):
        loads(Options(("http://nobody.invalid",)), [], 1)


def test_prompts_are_a_function_of_the_seed() -> None:
    options = Options(URL, prompts=3, prompt_words=5, body={"ignore_eos": True})
    made = bodies(options, "m")
    assert made == bodies(options, "m")
    assert len({str(body) for body in made}) == 3
    assert all(len(body["messages"][0]["content"].split()) == 5 and body["ignore_eos"] for body in made)
