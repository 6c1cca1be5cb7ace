import random

from baton_router.index import STRIDE, BlockIndex


def chain(length: int, seed: int = 0) -> list[bytes]:
    source = random.Random(seed)
    return [source.randbytes(16) for _ in range(length)]


def test_match_finds_the_depth_of_each_worker_wherever_it_drops_out() -> None:
    links = chain(200)
    for depth in (1, 2, STRIDE - 1, STRIDE, STRIDE + 1, 3 * STRIDE, 199, 200):
        index = BlockIndex(10_000)
        whole, part = index.add_worker(), index.add_worker()
        index.store(whole, links)
        index.store(part, links[:depth])
        assert index.match(links, 0b11) == {whole: 200, part: depth}


def test_match_leaves_out_workers_that_were_not_asked_for_or_have_nothing() -> None:
    links = chain(10)
    index = BlockIndex(100)
    first, second, third = (index.add_worker() for _ in range(3))
    index.store(first, links)
    index.store(second, links)
    assert index.match(links, 1 << second | 1 << third) == {second: 10}


def test_removing_a_worker_leaves_the_others_and_frees_its_bit() -> None:
    links = chain(10)
    index = BlockIndex(100)
    first, second = index.add_worker(), index.add_worker()
    index.store(first, links)
    index.store(second, links[:5])
    index.remove_worker(first)
    assert index.match(links, 1 << second) == {second: 5}
    assert len(index) == 5
    assert index.add_worker() == first


def test_discarded_blocks_are_gone_and_unknown_ones_ignored() -> None:
    links = chain(10)
    index = BlockIndex(100)
    bit = index.add_worker()
    index.store(bit, links)
    index.discard(bit, links[4:])
    index.discard(bit, chain(3, seed=9))
    assert index.match(links, 1 << bit) == {bit: 4}


def test_a_full_index_takes_no_new_hashes_but_still_counts_workers_of_known_ones() -> None:
    links = chain(8)
    index = BlockIndex(4)
    first, second = index.add_worker(), index.add_worker()
    index.store(first, links)
    index.store(second, links[:4])
    assert len(index) == 4
    assert index.not_indexed == 4
    assert index.match(links, 0b11) == {first: 4, second: 4}
