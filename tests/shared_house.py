"""One cluster for several tests of a module: starting one takes as long as most tests do."""

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager

from cluster import Cluster


class SharedHouse:
    """Lends a cluster to one test after another. A test that fails, or leaves a process dead, ends it: the next one gets a new one."""

    def __init__(self, open_house: Callable[[], AbstractAsyncContextManager[Cluster]]) -> None:
        """open_house: starts a cluster in a folder of its own, every time."""
        self._open = open_house
        self._stack = AsyncExitStack()
        self._house: Cluster | None = None
        self._is_lent = False

    @asynccontextmanager
    async def lent(self) -> AsyncIterator[Cluster]:
        """The cluster, for one test, which has to leave it settled. What earlier tests asked for may still be cached in it."""
        if self._is_lent:  # a test was given up at its time limit; what is left of it may still run in this loop, and keeps the old one
            await self.close()
        if self._house is None:
            self._house = await self._stack.enter_async_context(self._open())
        house, self._is_lent = self._house, True
        is_whole = False
        try:
            yield house
            is_whole = all(child.is_running for child in house.children.values())
        finally:
            if self._house is house:
                self._is_lent = False
                if not is_whole:
                    await self.close()

    async def close(self) -> None:
        """End all its processes."""
        self._house, self._is_lent = None, False
        await self._stack.aclose()
