"""`baton drain`: one instance leaves discovery, finishes what it has, and ends.

find (which one, is it needed) --Drain--> follow (what it still holds) --> how it ended, an exit code
"""

import asyncio
import enum
import time
from collections.abc import Callable, Collection, Iterable

import click
import grpc
import msgspec
from baton_contracts.discovery.v1 import instance_pb2 as pb
from baton_contracts.instance.v1 import instance_service_pb2 as drain_pb
from baton_contracts.instance.v1 import instance_service_pb2_grpc as drain_grpc
from baton_runtime.discovery import Discovery
from baton_runtime.errors import from_rpc_error
from baton_runtime.rpc import open_channel
from google.protobuf.duration_pb2 import Duration
from grpc_health.v1 import health_pb2, health_pb2_grpc

from baton_cli.status import SERVICE_NAMES

FIRST_LIMIT_S = 5.0  # for etcd's list, and for the instance's first message
SILENCE_LIMIT_S = 10.0  # an instance tells progress every 250 ms
HEALTH_LIMIT_S = 2.0


class Ending(enum.Enum):
    """How following a drain ended; the value is the command's exit code."""

    DRAINED = 0  # nothing is held any more, the process ends
    BEGUN = -1  # without --wait: it has begun. Exit code 0
    CUT_OFF = 3  # the grace was over, or a second signal came
    LOST = 4  # died, or fell silent, before it said how the drain ended
    TIMEOUT = 5  # --timeout passed; the drain goes on


class Refused(click.ClickException):
    """Nothing was drained; the message names the fix. Exit code 1."""


def find(instances: Iterable[pb.Instance], name: str) -> pb.Instance:
    """The instance of that id, or the only one whose id begins so. Raises: Refused."""
    known = sorted(instances, key=lambda i: i.instance_id)
    matches = [i for i in known if i.instance_id == name] or [i for i in known if name and i.instance_id.startswith(name)]
    if len(matches) == 1:
        return matches[0]
    if matches:
        raise Refused(f"{name!r} is not one instance but {len(matches)}: {_names(matches)}; write more of the id")
    if not known:
        raise Refused("no instance is registered; is --etcd the right one, and does anything run?")
    raise Refused(f"no instance {name!r} is registered; there are {_names(known)}")


def why_needed(instance: pb.Instance, others: Collection[pb.Instance]) -> str:
    """Why requests fail without it; empty if they do not. others: all but it that are ready."""
    if instance.service == pb.SERVICE_FRONTEND:
        return "" if any(i.service == pb.SERVICE_FRONTEND for i in others) else "it is the last ready frontend"
    if instance.service not in (pb.SERVICE_DECODE, pb.SERVICE_PREFILL):
        return ""  # frontends place requests without a router, and decode alone serves without kvtransfer
    model = instance.model.served_name
    same = [i for i in others if i.model.served_name == model]
    decoders = [i for i in same if i.service == pb.SERVICE_DECODE]
    if instance.service == pb.SERVICE_DECODE and not decoders:
        return f"it is the last ready decode instance of {model}"
    if any(pb.CAPABILITY_WHOLE in i.capabilities for i in decoders) or any(i.service == pb.SERVICE_PREFILL for i in same):
        return ""
    if instance.service == pb.SERVICE_DECODE:
        return f"no other ready instance of {model} may read prompts"
    return f"it is the last ready prefill instance of {model}, and its decode instances may not read prompts (can_prefill)"


async def run(
    etcd: str, namespace: str, name: str, *, wait: bool, timeout_s: float | None, grace_s: float | None, force: bool, as_json: bool
) -> int:
    """What the command does. Returns: its exit code. Raises: Refused."""
    instance = await _chosen(etcd, namespace, name, force=force)
    last = drain_pb.DrainResponse()

    def heard(progress: drain_pb.DrainResponse) -> None:
        last_text = _text(last)
        last.CopyFrom(progress)
        if as_json:
            click.echo(_json(progress))
        elif _text(progress) != last_text:
            click.echo(_text(progress), err=True)

    ending = await follow(instance, grace_s=grace_s, timeout_s=timeout_s, is_wait=wait, heard=heard)
    if ending in (Ending.LOST, Ending.TIMEOUT):
        click.echo(f"Error: {_unfinished(instance, ending, timeout_s)}", err=True)
    return max(0, ending.value)


async def follow(
    instance: pb.Instance,
    *,
    grace_s: float | None,
    timeout_s: float | None,
    is_wait: bool,
    heard: Callable[[drain_pb.DrainResponse], None],
) -> Ending:
    """Ask for the drain and hear of it until its end (or, unless is_wait, its beginning). Leaving early does not stop it.

    Raises: Refused if it has not begun as far as we know.
    """
    request = drain_pb.DrainRequest(incarnation=instance.incarnation)
    if grace_s is not None:
        grace = Duration()
        grace.FromMilliseconds(round(grace_s * 1000))
        request.grace.CopyFrom(grace)
    ends_at = None if timeout_s is None else time.monotonic() + timeout_s
    has_begun = False
    async with open_channel(instance.grpc_address) as channel:
        # No deadline: a drain takes as long as it does; silence ends the call.
        call = drain_grpc.InstanceServiceStub(channel).Drain(request)
        try:
            while True:
                left_s = SILENCE_LIMIT_S if has_begun else FIRST_LIMIT_S
                is_last = ends_at is not None and ends_at - time.monotonic() < left_s
                try:
                    async with asyncio.timeout(max(0.0, ends_at - time.monotonic()) if ends_at is not None and is_last else left_s):
                        progress = await call.read()
                except TimeoutError:
                    if is_last:
                        return Ending.TIMEOUT
                    if has_begun:
                        return Ending.LOST
                    raise Refused(_unreachable(instance, f"it is silent for {FIRST_LIMIT_S:g} s")) from None
                if not isinstance(progress, drain_pb.DrainResponse):
                    return Ending.LOST  # ended without its last message
                has_begun = True
                heard(progress)
                if progress.phase == drain_pb.DRAIN_PHASE_DRAINED:
                    return Ending.DRAINED
                if progress.phase == drain_pb.DRAIN_PHASE_CUT_OFF:
                    return Ending.CUT_OFF
                if not is_wait:
                    return Ending.BEGUN
        except grpc.aio.AioRpcError as error:
            if has_begun:
                return Ending.LOST
            raise Refused(_not_begun(instance, error)) from error
        finally:
            call.cancel()


async def _chosen(etcd: str, namespace: str, name: str, *, force: bool) -> pb.Instance:
    discovery = Discovery(etcd, namespace)
    await discovery.start()
    try:
        view = discovery.view(*SERVICE_NAMES)
        if not await view.synced(FIRST_LIMIT_S):
            raise Refused(f"etcd at {etcd} does not answer; is it running? Name another with --etcd HOST:PORT")
        instances = [i for i in view.instances.values() if not view.is_gone(i)]
    finally:
        await discovery.close()
    instance = find(instances, name)
    if not instance.grpc_address:
        raise Refused(f"{instance.instance_id} (version {instance.version}) serves no gRPC; stop it with SIGTERM to pid {instance.pid}")
    if not force and not instance.draining:
        others = [i for i in instances if i.incarnation != instance.incarnation and not i.draining]
        ready = [i for i, is_ready in zip(others, await asyncio.gather(*map(_is_ready, others)), strict=True) if is_ready]
        if why := why_needed(instance, ready):
            raise Refused(f"{instance.instance_id} is not drained: {why}. Start another one first, or use --force")
    return instance


async def _is_ready(instance: pb.Instance) -> bool:
    """Whether it says that it serves: one that has died stays registered for up to 10 s."""
    if not instance.grpc_address:
        return False
    async with open_channel(instance.grpc_address) as channel:
        try:
            answer = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=HEALTH_LIMIT_S)
        except grpc.aio.AioRpcError:
            return False
    return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)


def _names(instances: Iterable[pb.Instance]) -> str:
    return ", ".join(i.instance_id for i in instances)


def _not_begun(instance: pb.Instance, error: grpc.aio.AioRpcError) -> str:
    if error.code() is grpc.StatusCode.UNIMPLEMENTED:
        return f"{instance.instance_id} (version {instance.version}) cannot be drained by a call; send SIGTERM to pid {instance.pid}"
    if error.code() is grpc.StatusCode.FAILED_PRECONDITION:
        return f"{instance.instance_id} was started again meanwhile and serves on; ask again to drain its new life"
    if error.code() is grpc.StatusCode.UNAVAILABLE:
        return _unreachable(instance, from_rpc_error(error).message.rpartition(": ")[2])
    return f"{instance.instance_id} does not drain: {from_rpc_error(error).message}"


def _unreachable(instance: pb.Instance, why: str) -> str:
    return (
        f"{instance.instance_id} does not answer at {instance.grpc_address} ({why}). If it is dead, its record goes within 10 s and nothing"
        f" is to be drained; if it lives, send SIGTERM to pid {instance.pid} on its machine"
    )


def _unfinished(instance: pb.Instance, ending: Ending, timeout_s: float | None) -> str:
    if ending is Ending.TIMEOUT:
        return f"the drain of {instance.instance_id} is not over after {timeout_s:g} s; what has begun goes on: ask again to follow it"
    return f"{instance.instance_id} died or was cut off before it said how its drain ended; see its log, and whether: baton status"


def _phase(progress: drain_pb.DrainResponse) -> str:
    return drain_pb.DrainPhase.Name(progress.phase).removeprefix("DRAIN_PHASE_").lower().replace("_", " ")


def _text(progress: drain_pb.DrainResponse) -> str:
    held = progress.holdings
    return (
        f"{progress.instance_id} {_phase(progress)}: {held.running} running, {held.live_handoffs} handoffs, "
        f"{held.pinned_blocks} blocks pinned, {held.reserved_blocks} reserved"
    )


def _json(progress: drain_pb.DrainResponse) -> str:
    held = progress.holdings
    facts = {
        "instance_id": progress.instance_id,
        "incarnation": progress.incarnation,
        "phase": _phase(progress).replace(" ", "_"),
        "elapsed_s": progress.elapsed.ToMilliseconds() / 1000,
        "remaining_s": progress.remaining.ToMilliseconds() / 1000,
        "running": held.running,
        "live_handoffs": held.live_handoffs,
        "pinned_blocks": held.pinned_blocks,
        "reserved_blocks": held.reserved_blocks,
    }
    return msgspec.json.encode(facts).decode()
