"""A service for test_lifecycle.py, run as a process of its own: lifecycle_child.py <mode>. Prints what happens, one word per line."""

import asyncio
import gc
import resource
import sys
import threading
import time
from typing import ClassVar

from baton_runtime.config import CommonConfig, load
from baton_runtime.instance_service import serve_instance
from baton_runtime.lifecycle import Service, run
from baton_runtime.rpc import GrpcServer

MODE = sys.argv[1]


def say(word: str) -> None:
    sys.stdout.write(f"{word}\n")
    sys.stdout.flush()


class ChildService(Service):
    name: ClassVar[str] = "decode"

    async def start(self) -> None:
        self.closing.callback(say, "closed-first-started")
        if MODE == "start-hangs":
            say("starting")
            await asyncio.Event().wait()
        server = GrpcServer(self.config.listen)
        serve_instance(self, server)
        address = await server.start()
        self.closing.push_async_callback(server.close)
        self.closing.callback(say, "closed-last-started")
        if MODE == "task-fails":
            self.tasks.create_task(self._fail())
        if MODE == "config-error-in-start":
            await GrpcServer(address).start()
        self.log_ready(grpc_address=address)
        say(f"ready {address}" if MODE.startswith("called") else "ready")

    async def drain(self) -> None:
        if MODE == "tells-interpreter":
            say(f"{gc.get_freeze_count() > 10_000} {sys.getswitchinterval():.4f}")
        if MODE == "tells-open-files":
            say(str(resource.getrlimit(resource.RLIMIT_NOFILE)[0]))
        say("draining")
        if MODE in ("drain-hangs", "called-drain-hangs"):
            await asyncio.Event().wait()
        say("drained")

    async def close(self) -> None:
        if MODE == "thread-hangs":
            threading.Thread(target=time.sleep, args=[60]).start()
        if MODE == "look-up-hangs":
            asyncio.get_running_loop().run_in_executor(None, time.sleep, 60)
        await super().close()

    async def _fail(self) -> None:
        raise ValueError("background task")


if __name__ == "__main__":
    run(lambda: ChildService(load(CommonConfig, "decode")))
