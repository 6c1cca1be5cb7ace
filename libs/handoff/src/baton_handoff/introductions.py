"""Whom this worker may form a pair with, and with which secrets: told by kvtransfer, kept when it is gone."""

import hmac
from collections.abc import Callable
from dataclasses import dataclass, field

from baton_contracts.discovery.v1.instance_pb2 import Instance
from baton_contracts.kvtransfer.v1 import kvtransfer_service_pb2 as pb
from baton_engine.pool import BlockLayout
from baton_runtime.layouts import layout_mismatch, layout_text, model_mismatch

from baton_handoff.tag import layout_from_record
from baton_handoff.transports.reslice import Reslice

# Introductions are kept as long as the process, some 2 KB each; a restart of a peer adds one. Those that nobody asked for go first.
MAX_INTRODUCTIONS = 4096
MAX_SECRETS = 8  # per pair: one per kvtransfer life


@dataclass(slots=True)
class Acquaintance:
    """One introduced peer. secrets: newest first, all valid. refusal: why the pair must not be formed; "" if it may be."""

    peer: Instance
    secrets: list[bytes] = field(default_factory=list)
    refusal: str = ""


class Introductions:
    """All its state: `_known` by incarnation of the peer, longest unused first, and the callbacks of `subscribe`."""

    def __init__(self, own: Callable[[], Instance]) -> None:
        self._own = own
        self._known: dict[str, Acquaintance] = {}
        self._listeners: list[Callable[[str], None]] = []

    def subscribe(self, listener: Callable[[str], None]) -> None:
        """Call back with the peer's incarnation whenever an introduction arrives."""
        self._listeners.append(listener)

    def add(self, introduction: pb.Introduction) -> None:
        """News from a kvtransfer. A pair that differs by our own comparison is refused even if kvtransfer allows it."""
        incarnation = introduction.peer.incarnation
        # A copy: a part of a message keeps all of the message's memory, and this one is kept for as long as we live.
        peer = Instance()
        peer.CopyFrom(introduction.peer)
        known = self._known.pop(incarnation, None) or Acquaintance(peer)
        known.peer = peer
        known.refusal = introduction.refusal or why_incompatible(self._own(), introduction.peer)
        if introduction.pair_secret and introduction.pair_secret not in known.secrets:
            known.secrets = [introduction.pair_secret, *known.secrets][:MAX_SECRETS]
        self._known[incarnation] = known
        while len(self._known) > MAX_INTRODUCTIONS:
            del self._known[next(iter(self._known))]
        for listener in list(self._listeners):
            listener(incarnation)

    def get(self, incarnation: str) -> Acquaintance | None:
        """The peer, if it was introduced."""
        known = self._known.pop(incarnation, None)
        if known is not None:
            self._known[incarnation] = known
        return known

    def layout_of(self, incarnation: str) -> BlockLayout | None:
        """The peer's layout; None if the pair may not be formed, or is not introduced."""
        known = self._known.get(incarnation)
        return layout_from_record(known.peer.layout) if known is not None and not known.refusal else None

    def reslice_of(self, incarnation: str) -> Reslice | None:
        """How the peer's blocks become ours; None if they are alike, or nothing may be read from it."""
        layout = self.layout_of(incarnation)
        own = self._own().layout
        if layout is None or self._known[incarnation].peer.layout == own:
            return None
        return Reslice(layout, layout_from_record(own))

    def knows_secret(self, incarnation: str, secret: bytes) -> bool:
        """Whether a peer has proven that it is the one that was introduced."""
        known = self._known.get(incarnation)
        return known is not None and not known.refusal and any(hmac.compare_digest(secret, valid) for valid in known.secrets)


def why_incompatible(own: Instance, peer: Instance) -> str:
    """What keeps two workers from exchanging KV, naming both sides; "" if nothing does."""
    problems = model_mismatch(own.model, peer.model)
    if why := layout_problem(own, peer):
        problems.append(why)
    return f"{own.instance_id} and {peer.instance_id}: {'; '.join(problems)}" if problems else ""


def layout_problem(own: Instance, peer: Instance) -> str:
    """Why blocks of the one cannot be turned into blocks of the other, naming both layouts; "" if they can."""
    why = layout_mismatch(own.layout, peer.layout)
    if not why:
        try:
            layout_from_record(peer.layout)
        except ValueError as error:
            why = str(error)
    return f"layouts {layout_text(own.layout)} and {layout_text(peer.layout)}: {why}" if why else ""
