"""Memory for large tensors: blocks go back when nothing refers to them, and only then, and are used again."""

from __future__ import annotations

import threading

import pytest
import torch

from surgery.model import room as rooms
from surgery.model.room import LARGE, PAGE, SHARED, SMALL, SPARE, Shared, Spare, room, scratch

SHAPE = (LARGE // 2 // 512, 512)


@pytest.fixture
def spare(monkeypatch: pytest.MonkeyPatch) -> Spare:
    """Blocks of this test alone: what others let go does not come back here."""
    monkeypatch.setattr(rooms, "spare", Spare())
    monkeypatch.setattr(rooms, "shared", Shared())
    return rooms.spare


def test_a_block_is_used_again_when_no_view_of_it_is_left(spare: Spare) -> None:
    first = room(SHAPE, torch.bfloat16)
    assert first.is_contiguous() and first.shape == SHAPE and first.untyped_storage().nbytes() == LARGE
    place = first.data_ptr()
    assert place % PAGE == 0
    row, plain = first[3].fill_(2.0), first.view(torch.uint8).numpy()
    del first
    assert spare.held == 0
    second = room(SHAPE, torch.bfloat16)
    second.fill_(1.0)
    assert second.data_ptr() != place and bool((row == 2.0).all())
    del row
    assert spare.held == 0 and plain.size == LARGE
    del plain
    assert spare.held == LARGE
    third = room((LARGE // 4 + 7,), torch.float32)  # a little larger than the block that is free
    assert third.data_ptr() not in (place, second.data_ptr())
    assert room((LARGE - 5,), torch.uint8).data_ptr() != place  # smaller ones share a block of their own
    fourth = room((LARGE // 4,), torch.float32)
    assert fourth.data_ptr() == place and spare.held == 0
    del second, third, fourth
    assert spare.held > 0
    spare.clear()
    assert spare.held == 0


def test_smaller_tensors_share_a_block_and_keep_it(spare: Spare) -> None:
    tensors = [room((SMALL // 4 + i,), torch.float32).fill_(i) for i in range(8)]
    places = [t.data_ptr() for t in tensors]
    assert all(p % 64 == 0 for p in places) and places == sorted(places) and places[-1] - places[0] < SHARED
    assert all(bool((t == i).all()) for i, t in enumerate(tensors))
    assert all(t.untyped_storage().nbytes() == 4 * t.numel() for t in tensors)  # no view of something larger, for who asks
    last = tensors.pop()[5:]
    tensors.clear()
    rooms.shared.clear()
    assert spare.held == 0 and bool((last == 7).all())
    del last
    assert spare.held == SHARED
    again = room((SMALL,), torch.bool)
    assert again.data_ptr() == places[0] and spare.held == 0
    more = [room((LARGE - 64,), torch.uint8) for _ in range(SHARED // LARGE)]  # more than what is left of the block
    assert more[-1].data_ptr() not in range(places[0], places[0] + SHARED)
    assert room((SMALL // 4 - 1,), torch.float32).data_ptr() not in range(places[0], places[0] + SHARED)  # the allocator's


def test_the_oldest_blocks_go_where_there_are_too_many_bytes() -> None:
    held = Spare(limit=3 * PAGE)
    blocks = [held.take(size * PAGE) for size in (1, 2, 1)]
    for size, block in blocks:
        held.give(size, block)
    assert held.held == 3 * PAGE
    assert held.take(PAGE)[1] is blocks[2][1]  # the smallest that fits
    assert held.take(PAGE)[1] is blocks[1][1]  # twice as large is not too large
    assert held.held == 0 and held.take(PAGE)[1] not in [b for _, b in blocks]
    held.give(8 * PAGE, held.take(8 * PAGE)[1])
    assert held.held == 0 and SPARE > LARGE


def test_threads_take_and_give_at_once(spare: Spare) -> None:
    faults: list[str] = []

    def work(mark: int) -> None:
        for i in range(30):
            tensor = room((LARGE + 1000 * (i % 3 - 1),), torch.uint8).fill_(mark)
            if not bool((tensor[:: 1 << 12] == mark).all()):
                faults.append(f"{mark} at {i}")

    threads = [threading.Thread(target=work, args=(k + 1,)) for k in range(3)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not faults


def test_scratch_is_one_place_for_each_thread() -> None:
    first, second = scratch((3, 5), 2)
    assert first.shape == (3, 5) and first.data_ptr() != second.data_ptr()
    first.fill_(1.0)
    second.fill_(2.0)
    assert bool((first == 1.0).all())
    (smaller,) = scratch((2, 2), 1)
    assert smaller.data_ptr() == first.data_ptr() and bool((smaller == 1.0).all())
    elsewhere: list[int] = []
    worker = threading.Thread(target=lambda: elsewhere.extend(t.fill_(3.0).data_ptr() for t in scratch((3, 5), 2)))
    worker.start()
    worker.join()
    assert not {first.data_ptr(), second.data_ptr()} & set(elsewhere) and bool((first == 1.0).all() and (second == 2.0).all())
    larger = scratch((40, 500), 3)
    assert [t.shape for t in larger] == [(40, 500)] * 3 and len({t.data_ptr() for t in larger}) == 3
    assert [t.data_ptr() for t in scratch((40, 500), 3)] == [t.data_ptr() for t in larger]
