"""What the scheduler and the paged engine remember of one sequence."""

from array import array
from dataclasses import dataclass, field

from baton_runtime.hashing import chain_hashes

from baton_engine.api import EngineRequest, SamplingParams, SequenceKey, Work


@dataclass(slots=True, eq=False)
class SequenceState:
    """A sequence between add and its end. tokens grows with the output; KV of tokens [0, computed) lies in table."""

    request: EngineRequest
    number: int  # order of arrival
    arrived_at: float
    tokens: "array[int]"
    table: list[int] = field(default_factory=list)
    owns_table: bool = False  # a table may be empty: one token has no KV to hand over
    hashes: list[bytes] = field(default_factory=list)  # of full blocks, as far as computed
    computed: int = 0
    cached_tokens: int = 0
    published: int = 0  # full blocks that are reusable under their hash
    announced: int = 0  # PREFILL_ONLY: blocks below are announced, or the sink's own
    drawn: int = 0
    max_length: int = 0  # tokens at which the sequence ends with LENGTH
    stops: frozenset[int] = frozenset()  # tokens that end it with STOP
    paused: bool = False
    started: bool = False
    last_step: int = 0
    rank: float = 0.0
    key: SequenceKey = field(init=False)
    sampling: SamplingParams = field(init=False)
    num_prompt_tokens: int = field(init=False)
    is_prefill_only: bool = field(init=False)  # samples nothing; its blocks are promised to a sink

    def __post_init__(self) -> None:
        self.key = self.request.key
        self.sampling = self.request.sampling
        self.num_prompt_tokens = self.request.num_prompt_tokens
        self.is_prefill_only = self.request.work is Work.PREFILL_ONLY

    @property
    def goal(self) -> int:
        """Tokens whose KV is to be computed, as far as known now."""
        return self.request.num_kv_tokens if self.is_prefill_only else len(self.tokens)

    @property
    def remaining(self) -> int:
        """Tokens still to compute, as far as known now; 1 while decoding."""
        return self.goal - self.computed

    @property
    def is_decoding(self) -> bool:
        """Only the newest token is to be computed."""
        return not self.is_prefill_only and len(self.tokens) - self.computed == 1

    def hash_of(self, index: int, block_tokens: int, hash_block_tokens: int) -> bytes:
        """Hash of full block `index`; computed once, in order."""
        while len(self.hashes) <= index:
            start = len(self.hashes) * block_tokens
            block = self.tokens[start : start + block_tokens]
            parent = self.hashes[-1] if self.hashes else None
            self.hashes.append(chain_hashes(self.request.cache_root, block, hash_block_tokens, parent=parent)[-1])
        return self.hashes[index]
