import asyncio

import grpc
import pytest
from baton_handoff.link import STREAM_ENDED, until_first


async def test_writing_to_a_stream_whose_client_is_gone_ends_the_link_like_any_other_end() -> None:
    """What a server's write raises then, and a client's."""
    for error in (grpc.aio.InternalError("Failed execute_batch"), asyncio.InvalidStateError()):

        async def write(error: Exception = error) -> None:
            raise error

        with pytest.raises(STREAM_ENDED):
            await until_first(write(), asyncio.Event().wait())
