"""What `baton up` decides before it starts anything."""

import socket
from dataclasses import replace
from pathlib import Path

import click
import pytest
from baton_cli import up

OPTIONS = up.Options(
    engine="sim",
    profile="instant",
    model=up.demo_model(),
    served_name="m",
    counts={"frontend": 2, "router": 1, "prefill": 0, "decode": 1, "kvtransfer": 1},
    host="127.0.0.1",
    port=0,
    otlp="",
    sample_ratio=0.0,
    etcd="",
    folder=Path("unused"),
    ready_limit_s=1.0,
)


def listening(port: int, *, shared: bool) -> socket.socket:
    sock = socket.socket()
    if shared:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    try:
        sock.bind(("127.0.0.1", port))
        sock.listen()
    except OSError:
        sock.close()
        raise
    return sock


def test_several_frontends_get_one_port_that_only_they_can_bind() -> None:
    with up.reserved_port(OPTIONS) as placed:
        environments = [child.environment for child in up.plan(placed, "unused") if child.name.startswith("frontend-")]
        assert {e["BATON_FRONTEND_HTTP_LISTEN"] for e in environments} == {f"127.0.0.1:{placed.port}"}
        assert {e["BATON_FRONTEND_HTTP_REUSE_PORT"] for e in environments} == {"true"}
        assert len(environments) == 2
        with pytest.raises(OSError, match="in use"):
            listening(placed.port, shared=False)
        # The reservation itself takes no connection away from who listens.
        with listening(placed.port, shared=True) as server:
            for _ in range(20):
                with socket.create_connection(("127.0.0.1", placed.port), timeout=2):
                    server.accept()[0].close()


def test_one_frontend_shares_its_port_with_nobody() -> None:
    alone = replace(OPTIONS, counts={**OPTIONS.counts, "frontend": 1})
    with up.reserved_port(alone) as placed:
        (frontend,) = [child for child in up.plan(placed, "unused") if child.name.startswith("frontend-")]
    assert frontend.environment["BATON_FRONTEND_HTTP_REUSE_PORT"] == "false"


def test_a_port_that_cannot_be_reserved_is_named() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(click.ClickException, match=f"--port {port}"), up.reserved_port(replace(OPTIONS, port=port)):
            pass


def test_sglang_servers_take_whole_requests_only_where_there_is_no_prefill() -> None:
    for prefill, can_prefill in ((1, "false"), (0, "true")):
        options = replace(OPTIONS, engine="sglang", counts=OPTIONS.counts | {"prefill": prefill})
        environment = up.environment_of(options, "decode", "decode-0", "unused")
        assert (environment["BATON_DECODE_ENGINE"], environment["BATON_DECODE_CAN_PREFILL"]) == ("sglang", can_prefill)
    assert "BATON_DECODE_CAN_PREFILL" not in up.environment_of(OPTIONS, "decode", "decode-0", "unused")
