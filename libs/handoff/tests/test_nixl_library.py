"""nixl as an optional part: what is said where it is missing, and what UCX is told. Runs without nixl."""

import importlib

import pytest
from baton_engine.pool import BlockLayout
from baton_handoff.transports import PoolMemory, make_transports, nixl, nixl_library
from baton_handoff.transports.nixl_agent import AgentMaker
from baton_handoff.transports.nixl_library import NixlFailed, NixlMissing, engine_config, is_emulation_on

LAYOUT = BlockLayout(1, 4, 1, 16, "float32")


@pytest.fixture
def without_nixl(monkeypatch):
    real = importlib.import_module

    def import_module(name, *rest):
        if name.startswith("nixl"):
            raise ModuleNotFoundError(f"No module named {name.partition('.')[0]!r}")
        return real(name, *rest)

    monkeypatch.setattr(nixl_library.importlib, "import_module", import_module)
    monkeypatch.setattr(nixl, "load_nixl", nixl_library.load_nixl.__wrapped__)


def make(names):
    pool, memory = PoolMemory.allocate(2, LAYOUT, "d" * 16, shared=False)
    return make_transports(names, memory, pool, "d" * 16, "127.0.0.1:0", "")


def test_missing_library_names_the_reason_and_the_extra(without_nixl):
    with pytest.raises(NixlMissing, match=r"No module named 'nixl_cu12'.*baton-handoff\[nixl\]"):
        nixl.load_nixl()


def test_nixl_beside_others_is_left_out_with_a_warning_where_it_is_missing(without_nixl, capsys):
    assert [transport.name for transport in make(("nixl", "tcp"))] == ["tcp"]
    assert "baton-handoff[nixl]" in capsys.readouterr().out


def test_nixl_alone_is_an_error_where_it_is_missing(without_nixl):
    with pytest.raises(ValueError, match=r"no transport of nixl can be used: nixl: .*baton-handoff\[nixl\]"):
        make(("nixl",))


def test_order_of_preference_does_not_depend_on_the_setting():
    try:
        nixl_library.load_nixl()
    except NixlMissing as missing:
        pytest.skip(str(missing))
    assert [transport.name for transport in make(("tcp", "nixl"))] == ["nixl", "tcp"]


def test_without_rdma_ucx_is_reached_from_this_host_only(monkeypatch, tmp_path):
    monkeypatch.setattr(nixl_library, "_RDMA_DEVICES", tmp_path)
    assert "NET_DEVICES=lo" in engine_config(False, ())
    (tmp_path / "mlx5_0").touch()
    assert "NET_DEVICES" not in engine_config(False, ())


def test_ucx_does_not_ask_peers_whether_they_live():
    """Reads waited for the answer, up to half a second; the control connection tells."""
    assert "KEEPALIVE_INTERVAL=inf" in engine_config(False, ()).split(",")


def test_settings_win_over_the_own_ones():
    assert engine_config(False, (("NET_DEVICES", "eth0"), ("TLS", "tcp"))).endswith("TLS=tcp")
    assert "NET_DEVICES=eth0" in engine_config(False, (("NET_DEVICES", "eth0"),))


@pytest.mark.parametrize(("given", "wanted", "is_on"), [(None, False, False), (None, True, True), ("y", False, True), ("n", True, False)])
def test_environment_has_the_last_word_on_emulation(monkeypatch, given, wanted, is_on):
    if given is None:
        monkeypatch.delenv("UCX_PROTO_EMULATION_ENABLE", raising=False)
    else:
        monkeypatch.setenv("UCX_PROTO_EMULATION_ENABLE", given)
    assert is_emulation_on(wanted) is is_on


class FakeAgent:
    def __init__(self, name):
        self.name = name
        self.is_destroyed = False

    def destroy(self):
        self.is_destroyed = True
        return True


def test_agents_are_made_one_ahead_and_never_share_a_name():
    made = []
    maker = AgentMaker(lambda name: made.append(FakeAgent(name)) or made[-1], "d" * 16)
    maker.refill()
    maker.refill()
    assert [agent.name for agent in made] == [maker.take().name]
    assert len({maker.take().name for _ in range(9)}) == 9
    assert all(agent.name.startswith("d" * 16) for agent in made)


def test_closed_maker_ends_the_spare_agent_and_makes_no_other():
    made = []
    maker = AgentMaker(lambda name: made.append(FakeAgent(name)) or made[-1], "d" * 16)
    maker.refill()
    maker.close()
    maker.refill()
    assert [agent.is_destroyed for agent in made] == [True]


def test_spare_agent_that_cannot_be_made_is_missed_only_when_it_is_needed():
    def make(name):
        raise NixlFailed("making an agent", OSError("too many open files"))

    maker = AgentMaker(make, "d" * 16)
    maker.refill()
    with pytest.raises(NixlFailed, match="too many open files"):
        maker.take()
