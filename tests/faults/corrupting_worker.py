"""A worker that corrupts one thing, once, when the file named by BATON_TEST_CORRUPT is there (who takes the file away does it).

python corrupting_worker.py prefill byte   one byte of one pull over tcp is another when it leaves
python corrupting_worker.py decode tag     one Confirm carries the tag of other tokens
python corrupting_worker.py prefill tag    one tag is computed for other tokens than those that were asked for
"""

import os
import socket
import sys
from collections.abc import Sequence

from baton_decode.config import DecodeConfig
from baton_decode.main import DecodeService
from baton_handoff import sink, source, tag
from baton_handoff.transports import tcp_wire
from baton_prefill.config import PrefillConfig
from baton_prefill.main import PrefillService
from baton_runtime.config import load
from baton_runtime.lifecycle import run

FILE = "BATON_TEST_CORRUPT"
MIN_BYTES = 4096  # of what is sent to be KV and no head


def is_due() -> bool:
    """Whether to corrupt now; true once per file."""
    try:
        os.unlink(os.environ[FILE])
    except FileNotFoundError:
        return False
    return True


def corrupt_bytes() -> None:
    """One bit of the KV on its way; the checksum was made of the right bytes."""
    send_views = tcp_wire.send_views

    def send(sock: socket.socket, views: Sequence[memoryview], watch: tcp_wire.Watch, num_bytes: int = 0) -> None:
        longest = max(views, key=len)
        if len(longest) >= MIN_BYTES and is_due():
            other = bytearray(longest)
            other[len(other) // 2] ^= 1
            views = [memoryview(other) if view is longest else view for view in views]
        send_views(sock, views, watch, num_bytes)

    tcp_wire.send_views = send  # type: ignore[assignment]


def corrupt_tags() -> None:
    """The tag of one Confirm."""

    class OtherTags(tag.TagChain):
        def at(self, end_block: int) -> bytes:
            return bytes(tag.TAG_BYTES) if is_due() else super().at(end_block)

    sink.TagChain = source.TagChain = OtherTags  # type: ignore[misc]


if __name__ == "__main__":
    service, what = sys.argv[1:]
    {"byte": corrupt_bytes, "tag": corrupt_tags}[what]()
    if service == "prefill":
        run(lambda: PrefillService(load(PrefillConfig, "prefill")))
    else:
        run(lambda: DecodeService(load(DecodeConfig, "decode")))
