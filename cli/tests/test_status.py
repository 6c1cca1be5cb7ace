import json

from baton_cli.status import Blocks, InstanceReport, LinkReport, Report, to_json, to_text


def report() -> Report:
    worker = InstanceReport("decode", "decode-0", "0" * 16, "0.1.0", "127.0.0.1:1", 42, "127.0.0.1:2", False, "ok")
    worker.blocks, worker.running_sequences, worker.waiting_sequences, worker.live_handoffs = Blocks(10, 5, 2, 1, 1, 1), 3, 0, 1
    worker.transports = ["shm", "tcp"]
    return Report("127.0.0.1:3", [worker], ["no router is registered"])


def test_json_has_what_machines_rely_on() -> None:
    instance = json.loads(to_json(report()))["instances"][0]
    assert {key: instance[key] for key in ("service", "version", "address", "pid", "metrics")} == {
        "service": "decode",
        "version": "0.1.0",
        "address": "127.0.0.1:1",
        "pid": 42,
        "metrics": "127.0.0.1:2",
    }


def test_text_shows_what_a_worker_holds_and_what_is_wrong() -> None:
    text = to_text(report())
    assert "decode-0" in text
    assert "3/10" in text
    assert "no router is registered" in text


def test_links_show_transport_speed_bytes_and_why() -> None:
    made = report()
    made.links = [LinkReport("prefill-0", "decode-0", "tcp", "tcp: not on the same host", 2.5, 3 << 20)]
    text = to_text(made)
    for part in ("prefill-0 > decode-0", "tcp: not on the same host", "2.50", "3.0 MiB"):
        assert part in text
    assert json.loads(to_json(made))["links"][0]["reason"] == "tcp: not on the same host"
