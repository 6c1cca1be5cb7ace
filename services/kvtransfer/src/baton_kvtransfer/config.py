"""Settings of kvtransfer."""

from dataclasses import dataclass
from typing import Annotated

import msgspec
from baton_runtime.config import CommonConfig


@dataclass(frozen=True)
class KvTransferConfig(CommonConfig):
    """What kvtransfer can be told, besides what every service can.

    max_workers: workers that may report at once; a further one is refused.
    max_unsent_messages: messages a worker may leave unread; beyond it its stream is ended, and its next hello starts afresh.
    max_watchers: watches of handoffs (`baton handoffs`) that may be open at once; a further one is refused.
    """

    max_workers: Annotated[int, msgspec.Meta(ge=2)] = 1024
    max_unsent_messages: Annotated[int, msgspec.Meta(ge=16)] = 4096
    max_watchers: Annotated[int, msgspec.Meta(ge=1)] = 64
