"""Drawing tokens: penalties, filters and Gumbel noise that is a pure function of (seed, choice, position, token id).

What is drawn for a sequence depends on its own logits, parameters and tokens, never on the batch (law 3 of the design):
- the token is argmax(filtered logits / temperature + Gumbel noise), which draws from their softmax. A small change of the
  logits changes the draw only if two scores nearly tie; drawing by inverse CDF would change it 30 times as often in
  bfloat16 (measured; docs/engine-torch.md).
- the noise comes from a counter: splitmix64 in wrapping 64-bit integers, the same on every device;
- each filter is a threshold on logits, so tokens with equal logits are kept or dropped together, in whatever order a sort
  leaves them. (top_k = 1 is greedy: the lowest id wins.)
Order: logit_bias, repetition, frequency and presence penalty, min_tokens, temperature, top_k, top_p, min_p.
"""

import math
from array import array
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from baton_engine.api import SamplingParams

_WORD = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15  # increment and multipliers of splitmix64 (Steele, Lea, Flood 2014)
_MULTIPLIERS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
_MANTISSA_BITS = 52
_BELOW_ONE = 1.0 - 2.0**-24  # largest float32 below 1
_LEAST_TEMPERATURE = 1e-5  # colder than this is greedy: logits divided by it would overflow
_MOST_CANDIDATES = 1024  # a filter rarely keeps more; sorting all of a large vocabulary costs 15 ms per row
_PIECE_VALUES = 1 << 18  # 1 MiB of float32 at a time: three times as fast as 32 rows of a vocabulary of 152,000 at once


@dataclass(frozen=True, slots=True)
class DrawRequest:
    """One sequence whose next token is drawn. token_ids: prompt, then all output so far (type code "I")."""

    params: SamplingParams
    token_ids: "array[int]"
    num_prompt_tokens: int

    @property
    def position(self) -> int:
        """Output position of the token drawn."""
        return len(self.token_ids) - self.num_prompt_tokens


@dataclass(frozen=True, slots=True)
class Drawn:
    """A token and, if asked for, natural log probabilities under the model's own logits (before anything is done to them)."""

    token_id: int
    logprob: float | None = None
    top_token_ids: tuple[int, ...] = ()
    top_logprobs: tuple[float, ...] = ()


def draw(logits: Tensor, requests: Sequence[DrawRequest], eos_token_ids: frozenset[int] = frozenset()) -> list[Drawn]:
    """Draw one token per row.

    logits: [len(requests), vocabulary], any float type and device, finite; not changed.
    """
    scores = adjusted(logits, requests, eos_token_ids)
    random = [row for row, request in enumerate(requests) if is_random(request.params)]
    token_ids = scores.argmax(-1)  # of equal values the first, as torch documents
    if random:
        rows = _index(random, logits)
        token_ids[rows] = _draw_random(scores[rows], [requests[row] for row in random])
    drawn = [Drawn(token_id) for token_id in token_ids.tolist()]
    for row, request in enumerate(requests):
        if request.params.top_logprobs is not None:
            drawn[row] = _with_logprobs(logits[row], drawn[row].token_id, request.params.top_logprobs)
    return drawn


def is_random(params: SamplingParams) -> bool:
    """Whether these parameters draw; otherwise they take the most likely token."""
    return params.temperature >= _LEAST_TEMPERATURE and params.top_k != 1


def adjusted(logits: Tensor, requests: Sequence[DrawRequest], eos_token_ids: frozenset[int] = frozenset()) -> Tensor:
    """Logits after logit_bias, penalties and min_tokens, float32; the input itself if nothing applies and it is float32."""
    scores = logits.float()
    for row, request in enumerate(requests):
        changes = _adjust_row(logits[row], request, eos_token_ids)
        if changes is None:
            continue
        if scores.data_ptr() == logits.data_ptr():
            scores = scores.clone()
        scores[row] = changes
    return scores


def _adjust_row(logits: Tensor, request: DrawRequest, eos_token_ids: frozenset[int]) -> Tensor | None:
    """One adjusted row, or None if nothing applies to it."""
    params = request.params
    penalised = params.repetition_penalty != 1.0 or params.frequency_penalty != 0.0 or params.presence_penalty != 0.0
    too_early = sorted(t for t in eos_token_ids | params.stop_token_ids if t < len(logits)) if request.position < params.min_tokens else []
    if not (params.logit_bias or penalised or too_early):
        return None
    row = logits.to(torch.float32, copy=True)
    bias = {token: value for token, value in params.logit_bias.items() if 0 <= token < len(row)}
    if bias:
        row[_index(list(bias), row)] += torch.tensor(list(bias.values()), dtype=torch.float32, device=row.device)
    if penalised:
        _penalise(row, request)
    if too_early:
        row[_index(too_early, row)] = -torch.inf
    return row


def _penalise(row: Tensor, request: DrawRequest) -> None:
    """In place. Repetition looks at prompt and output, frequency and presence at the output only, as OpenAI's do."""
    params = request.params
    tokens = np.frombuffer(request.token_ids, dtype=np.uint32).astype(np.int64)
    if params.repetition_penalty != 1.0:
        seen = torch.from_numpy(np.unique(tokens)).to(row.device)
        values = row[seen]
        row[seen] = torch.where(values > 0, values / params.repetition_penalty, values * params.repetition_penalty)
    output, counts = np.unique(tokens[request.num_prompt_tokens :], return_counts=True)
    if len(output) and (params.frequency_penalty or params.presence_penalty):
        cost = params.frequency_penalty * counts.astype(np.float32) + params.presence_penalty
        row[torch.from_numpy(output).to(row.device)] -= torch.from_numpy(cost.astype(np.float32)).to(row.device)


def _draw_random(scores: Tensor, requests: Sequence[DrawRequest]) -> Tensor:
    """Token ids of rows that draw, in pieces that stay in the processor's cache."""
    piece = max(1, _PIECE_VALUES // scores.shape[-1]) if scores.device.type == "cpu" else len(requests)
    return torch.cat([_draw_piece(scores[i : i + piece], requests[i : i + piece]) for i in range(0, len(requests), piece)])


def _draw_piece(scores: Tensor, requests: Sequence[DrawRequest]) -> Tensor:
    """All rows have a positive temperature. Noise is made for the most likely tokens only, where a filter drops all others."""
    params = [request.params for request in requests]
    scaled = scores / _column([p.temperature for p in params], scores)
    keys = stream_keys(requests, scores.device)
    if any(_has_filter(p) for p in params):
        most = min(scaled.shape[-1], max([_MOST_CANDIDATES, *(p.top_k for p in params)]))
        top = scaled.topk(most, dim=-1)
        threshold, is_found = _thresholds(top.values, scaled, params)
        if is_found and bool((threshold > top.values[:, -1:]).all()):
            noisy = torch.where(top.values >= threshold, top.values + gumbel(keys, top.indices), -torch.inf)
            return top.indices.gather(-1, noisy.argmax(-1, keepdim=True))[:, 0]
        if not is_found:
            threshold, _ = _thresholds(scaled.sort(dim=-1, descending=True).values, scaled, params)
        scaled = torch.where(scaled >= threshold, scaled, -torch.inf)
    return (scaled + gumbel(keys, torch.arange(scaled.shape[-1], device=scores.device))).argmax(-1)


def _has_filter(params: SamplingParams) -> bool:
    return params.top_k > 0 or params.top_p < 1.0 or params.min_p > 0.0


def _thresholds(values: Tensor, scaled: Tensor, params: Sequence[SamplingParams]) -> tuple[Tensor, bool]:
    """Smallest value that top_k, top_p and min_p keep, per row: [rows, 1]; and whether `values` were enough to tell.

    scaled: [rows, vocabulary], after temperature; values: its largest, in descending order, at least top_k of them. top_p
    counts within what top_k keeps; min_p is relative to the most likely token. The most likely token is always kept.
    """
    vocabulary, most = scaled.shape[-1], values.shape[-1]
    at = _index([(p.top_k if 0 < p.top_k < vocabulary else vocabulary) - 1 for p in params], scaled)[:, None]
    is_limited = at < vocabulary - 1
    by_k = torch.where(is_limited, values.gather(-1, at.clamp(max=most - 1)), -torch.inf)

    top = values[:, :1]
    total = torch.where(scaled >= by_k, (scaled - top).exp_(), 0.0).sum(-1, keepdim=True, dtype=torch.float64)
    likely = (values - top).double().exp_()
    top_p = _column([p.top_p for p in params], scaled).double()
    is_cut = top_p < 1.0
    kept = ((likely.cumsum(-1) - likely < top_p * total) & (values >= by_k)).sum(-1, keepdim=True).clamp_(min=1)
    by_p = torch.where(is_cut, values.gather(-1, kept - 1), -torch.inf)
    is_found = most == vocabulary or bool(((kept < most) | ~is_cut | is_limited).all())

    log_min_p = _column([math.log(p.min_p) if p.min_p > 0 else -math.inf for p in params], scaled)
    return torch.maximum(torch.maximum(by_k, by_p), torch.minimum(top + log_min_p, top)), is_found


def stream_keys(requests: Sequence[DrawRequest], device: torch.device | str = "cpu") -> Tensor:
    """The noise stream of each draw, from (seed, choice, position): [rows, 1], int64."""
    keys = []
    for request in requests:
        key = _mix(request.params.seed + _GOLDEN)
        key = _mix(key ^ _mix(request.params.choice + 2 * _GOLDEN))
        keys.append(_signed(_mix(key ^ _mix(request.position + 3 * _GOLDEN))))
    return torch.tensor(keys, dtype=torch.int64, device=device)[:, None]


def gumbel(keys: Tensor, token_ids: Tensor) -> Tensor:
    """Noise of token ids under each stream. keys: [rows, 1]; token_ids: [tokens] or [rows, tokens]; result [rows, tokens], float32.

    -log(-log(1 - w)) with w uniform in (0, 1): large noise comes from small w, where float32 is exact to 1 part in 2**24,
    so the tail is right up to 36 (w = 2**-53).
    """
    bits = (token_ids + 1) * _signed(_GOLDEN) + keys
    for shift, multiplier in ((30, _MULTIPLIERS[0]), (27, _MULTIPLIERS[1])):
        bits.bitwise_xor_(_shift_right(bits, shift)).mul_(_signed(multiplier))
    bits.bitwise_xor_(_shift_right(bits, 31))
    uniform = _shift_right(bits, 64 - _MANTISSA_BITS).double().add_(0.5).mul_(2.0**-_MANTISSA_BITS).float().clamp_(max=_BELOW_ONE)
    return uniform.neg_().log1p_().neg_().log_().neg_()


def _with_logprobs(logits: Tensor, token_id: int, num_top: int) -> Drawn:
    logprobs = logits.float().log_softmax(-1)
    top = logprobs.topk(min(num_top, len(logprobs)))
    ranked = sorted(zip(top.values.tolist(), top.indices.tolist(), strict=True), key=lambda pair: (-pair[0], pair[1]))
    return Drawn(token_id, float(logprobs[token_id]), tuple(i for _, i in ranked), tuple(value for value, _ in ranked))


def _mix(word: int) -> int:
    """splitmix64's finaliser on Python integers."""
    word &= _WORD
    word = ((word ^ (word >> 30)) * _MULTIPLIERS[0]) & _WORD
    word = ((word ^ (word >> 27)) * _MULTIPLIERS[1]) & _WORD
    return word ^ (word >> 31)


def _signed(word: int) -> int:
    """The int64 with the same bits."""
    return word - (1 << 64) if word >> 63 else word


def _shift_right(words: Tensor, count: int) -> Tensor:
    """Logical shift: torch's own on int64 copies the sign."""
    return (words >> count).bitwise_and_((1 << (64 - count)) - 1)


def _index(values: Sequence[int], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=torch.int64, device=like.device)


def _column(values: Sequence[float], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=torch.float32, device=like.device)[:, None]
