"""Drawing tokens: distribution, independence of the batch, filters against a plain reference."""

import math
import random
from array import array
from collections import Counter
from collections.abc import Sequence

import pytest

torch = pytest.importorskip("torch")

from baton_engine import sampling  # noqa: E402
from baton_engine.api import SamplingParams  # noqa: E402
from baton_engine.sampling import Drawn, DrawRequest, adjusted, draw, gumbel, stream_keys  # noqa: E402

EOS = frozenset({2})
KNOWN = [965, 361, 505, 729, 979, 434, 619, 463, 49, 90, 786, 618, 94, 24, 307, 662]


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def request(prompt: Sequence[int] = (), output: Sequence[int] = (), **params: object) -> DrawRequest:
    return DrawRequest(SamplingParams(**params), array("I", [*prompt, *output]), len(prompt))  # type: ignore[arg-type]


def random_logits(rows: int, vocabulary: int, seed: int = 0, scale: float = 2.0) -> torch.Tensor:
    return torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(seed)) * scale


def ids(drawn: Sequence[Drawn]) -> list[int]:
    return [d.token_id for d in drawn]


def chi_square(counts: Counter[int], probabilities: Sequence[float]) -> float:
    total = counts.total()
    return sum((counts[i] - total * p) ** 2 / (total * p) for i, p in enumerate(probabilities) if p > 0)


@pytest.mark.parametrize("varies", ["seed", "choice", "position"])
def test_draws_follow_the_softmax_along_every_part_of_the_key(varies: str) -> None:
    logits, temperature, num = random_logits(1, 12, seed=1), 0.7, 20_000
    if varies == "position":
        requests = [request(output=[0] * i, temperature=temperature) for i in range(0, 2_000)] * (num // 2_000)
        requests = [DrawRequest(SamplingParams(seed=i // 2_000, temperature=temperature), r.token_ids, 0) for i, r in enumerate(requests)]
    else:
        requests = [request(temperature=temperature, **{varies: i}) for i in range(num)]
    counts = Counter(ids(draw(logits.expand(num, -1), requests)))
    assert chi_square(counts, (logits[0] / temperature).softmax(-1).tolist()) < 31.3  # 11 degrees of freedom, 99.9 %


def test_draws_of_rare_tokens_are_as_rare_as_they_should_be() -> None:
    """The tail of the noise: a token 8 nats below must come once in about 3,000 draws."""
    logits = torch.tensor([[8.0, 0.0]])
    num = 300_000
    keys = torch.arange(num, dtype=torch.int64)[:, None] * 0x5851F42D4C957F2D
    noisy = logits + gumbel(keys, torch.arange(2))
    rare = int((noisy.argmax(-1) == 1).sum())
    expected = num / (1 + math.exp(8))
    assert abs(rare - expected) < 4 * math.sqrt(expected)


def test_noise_is_finite_for_every_word_and_spread_over_its_range() -> None:
    noise = gumbel(torch.arange(-500, 500, dtype=torch.int64)[:, None] * 0x2545F4914F6CDD1D, torch.arange(1000))
    assert bool(noise.isfinite().all())
    assert float(noise.mean()) == pytest.approx(0.57722, abs=0.006)
    assert float(noise.var()) == pytest.approx(math.pi**2 / 6, abs=0.02)


def test_noise_is_that_of_splitmix64_in_plain_integers() -> None:
    word, golden = (1 << 64) - 1, 0x9E3779B97F4A7C15

    def mix(z: int) -> int:
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & word
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & word
        return z ^ (z >> 31)

    seed, choice, position = (1 << 64) - 7, 3, 5
    key = mix((seed + golden) & word)
    key = mix(key ^ mix((choice + 2 * golden) & word))
    key = mix(key ^ mix((position + 3 * golden) & word))
    noise = gumbel(stream_keys([request(output=[1] * position, seed=seed, choice=choice)]), torch.arange(50))[0]
    for token, value in enumerate(noise.tolist()):
        uniform = ((mix((key + (token + 1) * golden) & word) >> 12) + 0.5) * 2.0**-52
        assert value == pytest.approx(-math.log(-math.log1p(-uniform)), abs=2e-5)


def test_known_draws_stay_what_they_are() -> None:
    """Another noise would break resumes across versions: change this only with a new major version."""
    requests = [request(output=[0] * i, seed=7, temperature=1.0) for i in range(16)]
    assert ids(draw(torch.zeros(16, 1000), requests)) == KNOWN


def test_noise_bits_do_not_depend_on_shape_or_order() -> None:
    keys = torch.arange(7, dtype=torch.int64)[:, None] * 1_000_003
    whole = gumbel(keys, torch.arange(1013))
    shuffled = torch.randperm(1013, generator=torch.Generator().manual_seed(0))
    assert torch.equal(gumbel(keys, shuffled.expand(7, -1)), whole[:, shuffled])
    for row in range(7):
        assert torch.equal(gumbel(keys[row : row + 1], torch.arange(1013))[0], whole[row])
    assert torch.equal(gumbel(keys, torch.arange(5, 18)), whole[:, 5:18])


def test_draws_do_not_depend_on_the_batch() -> None:
    choose = random.Random(2)
    logits = random_logits(24, 501)
    requests = [
        request(
            [choose.randrange(501) for _ in range(9)],
            [choose.randrange(501) for _ in range(choose.randrange(5))],
            seed=choose.getrandbits(64),
            choice=choose.randrange(3),
            temperature=choose.choice([0.0, 0.7, 1.3]),
            top_p=choose.choice([1.0, 0.9]),
            top_k=choose.choice([0, 1, 40]),
            min_p=choose.choice([0.0, 0.02]),
            frequency_penalty=choose.choice([0.0, 0.5]),
            repetition_penalty=choose.choice([1.0, 1.2]),
        )
        for _ in range(24)
    ]
    together = ids(draw(logits, requests, EOS))
    assert together == [draw(logits[i : i + 1], [r], EOS)[0].token_id for i, r in enumerate(requests)]
    order = list(range(24))
    choose.shuffle(order)
    assert [together[i] for i in order] == ids(draw(logits[order], [requests[i] for i in order], EOS))


def test_draws_are_the_same_whether_pieces_or_candidates_are_used(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = random_logits(6, 3000, scale=3.0)
    requests = [
        request(seed=i, temperature=1.0, top_p=p, top_k=k)
        for i, (p, k) in enumerate([(0.5, 0), (0.99, 0), (1, 7), (0.8, 99), (1, 0), (0.1, 5)])
    ]
    want = ids(draw(logits, requests))
    for most, piece in ((4, 1 << 18), (1024, 1), (3000, 6000), (16, 1)):
        monkeypatch.setattr(sampling, "_MOST_CANDIDATES", most)
        monkeypatch.setattr(sampling, "_PIECE_VALUES", piece)
        assert ids(draw(logits, requests)) == want


def test_a_small_change_of_the_logits_rarely_changes_a_draw() -> None:
    logits = random_logits(2000, 64)
    requests = [request(seed=i, temperature=1.0) for i in range(2000)]
    near = logits + random_logits(2000, 64, seed=9, scale=1e-3)
    flips = sum(a != b for a, b in zip(ids(draw(logits, requests)), ids(draw(near, requests)), strict=True))
    assert flips <= 10


def kept_by_reference(logits: Sequence[float], params: SamplingParams) -> set[int]:
    """The filters, one token at a time."""
    order = sorted(range(len(logits)), key=lambda i: -logits[i])
    if params.top_k:
        order = order[: params.top_k]
    weights = {i: math.exp((logits[i] - logits[order[0]]) / params.temperature) for i in order}
    total, before, kept = sum(weights.values()), 0.0, set()
    for i in order:
        if before < params.top_p * total and weights[i] >= params.min_p * weights[order[0]]:
            kept.add(i)
        before += weights[i]
    return kept


@pytest.mark.parametrize("seed", range(40))
def test_filters_keep_what_a_plain_reference_keeps(seed: int) -> None:
    choose = random.Random(seed)
    logits = random_logits(1, 40, seed=seed)
    params = {
        "temperature": choose.choice([0.5, 1.0, 1.7]),
        "top_k": choose.choice([0, 2, 5, 39, 40, 1000]),
        "top_p": choose.choice([1.0, 0.95, 0.5, 0.01]),
        "min_p": choose.choice([0.0, 0.05, 0.5]),
    }
    num = 1500
    drawn = set(ids(draw(logits.expand(num, -1), [request(seed=s, **params) for s in range(num)])))
    kept = kept_by_reference(logits[0].tolist(), SamplingParams(**params))
    assert drawn <= kept
    probabilities = (logits[0] / params["temperature"]).softmax(-1)
    share = probabilities / sum(float(probabilities[i]) for i in kept)
    assert {i for i in kept if share[i] > 0.01} <= drawn


def test_equal_logits_at_a_cut_are_kept_together() -> None:
    logits = torch.tensor([[3.0, 1.0, 2.0, 2.0, 2.0]])
    drawn = ids(draw(logits.expand(300, -1), [request(seed=s, temperature=1.0, top_k=2) for s in range(300)]))
    assert set(drawn) == {0, 2, 3, 4}


@pytest.mark.parametrize("params", [{"temperature": 0.0}, {"temperature": 1.0, "top_k": 1}, {"temperature": 1e-9}])
def test_greedy_takes_the_lowest_id_of_equal_logits(params: dict[str, float]) -> None:
    logits = torch.zeros(3, 5000)
    logits[:, [4321, 77, 1500]] = 2.5
    assert ids(draw(logits, [request(seed=s, **params) for s in range(3)])) == [77, 77, 77]


def test_penalties_are_those_of_a_plain_reference() -> None:
    choose = random.Random(4)
    logits = random_logits(1, 30)
    prompt, output = [choose.randrange(30) for _ in range(10)], [choose.randrange(30) for _ in range(15)]
    scores = adjusted(logits, [request(prompt, output, repetition_penalty=1.3, frequency_penalty=0.4, presence_penalty=-0.7)])[0]
    for token, raw in enumerate(logits[0].tolist()):
        want = raw
        if token in prompt or token in output:
            want = want / 1.3 if want > 0 else want * 1.3
        if token in output:
            want -= 0.4 * output.count(token) - 0.7
        assert float(scores[token]) == pytest.approx(want, abs=1e-5)


def test_logit_bias_comes_before_penalties_and_leaves_the_logits_alone() -> None:
    logits = torch.zeros(2, 4)
    scores = adjusted(logits, [request([3], logit_bias={3: 2.0, 900: 5.0}, repetition_penalty=2.0), request()])
    assert scores.tolist() == [[0.0, 0.0, 0.0, 1.0], [0.0, 0.0, 0.0, 0.0]]
    assert not logits.any()


def test_end_and_stop_tokens_cannot_be_drawn_before_min_tokens() -> None:
    logits = torch.tensor([[0.0, 0.0, 50.0, 40.0, 1.0]])
    early = request([1], [1, 1], min_tokens=3, stop_token_ids=frozenset({3, 900}))
    due = request([1], [1, 1, 1], min_tokens=3, stop_token_ids=frozenset({3}))
    assert ids(draw(logits, [early], EOS)) == [4]
    assert ids(draw(logits, [due], EOS)) == [2]
    sampled = [request([1], [1], seed=s, min_tokens=3, temperature=2.0, top_p=0.9) for s in range(100)]
    assert 2 not in ids(draw(logits.expand(100, -1), sampled, EOS))


def test_logprobs_are_of_the_raw_logits_and_sorted() -> None:
    logits = random_logits(1, 50).to(torch.bfloat16)
    [drawn] = draw(logits, [request(temperature=0.3, seed=1, top_logprobs=4, logit_bias={9: 100.0})])
    raw = logits[0].float().log_softmax(-1)
    assert drawn.token_id == 9
    assert drawn.logprob == pytest.approx(float(raw[9]))
    assert list(drawn.top_logprobs) == pytest.approx(raw.sort(descending=True).values[:4].tolist())
    [none] = draw(logits, [request(top_logprobs=0)])
    assert none.logprob is not None
    assert none.top_token_ids == ()
    assert draw(logits, [request()])[0].logprob is None
