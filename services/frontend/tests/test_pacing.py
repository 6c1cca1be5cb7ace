"""Resumes a few per tick, before new work."""

from baton_frontend.pacing import Pacer


def test_new_work_leaves_at_once() -> None:
    pacer: Pacer[str] = Pacer(1)
    assert all(pacer.admit("new", is_resume=False) for _ in range(10))


def test_resumes_leave_a_few_per_tick_in_order() -> None:
    pacer: Pacer[int] = Pacer(2)
    assert [pacer.admit(n, is_resume=True) for n in range(5)] == [True, True, False, False, False]
    assert pacer.tick() == [2, 3]
    assert pacer.tick() == [4]
    assert pacer.tick() == []


def test_new_work_waits_behind_held_resumes() -> None:
    pacer: Pacer[str] = Pacer(1)
    for n in range(3):
        pacer.admit(f"resume-{n}", is_resume=True)
    assert not pacer.admit("new", is_resume=False)
    assert len(pacer) == 3
    assert pacer.tick() == ["resume-1"]
    assert pacer.tick() == ["resume-2", "new"]
    assert pacer.admit("new", is_resume=False)
