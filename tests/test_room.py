"""Memory for large tensors: blocks go back when nothing refers to them, and only then, and are used again."""

from __future__ import annotations

import threading

import torch

from surgery.model.room import LARGE, PAGE, SPARE, Spare, room, spare

SHAPE = (LARGE // 2 // 512, 512)


def test_a_block_is_used_again_when_no_view_of_it_is_left() -> None:
    spare.clear()
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
    assert room((LARGE - 5,), torch.uint8).data_ptr() != place  # small ones are the allocator's
    fourth = room((LARGE // 4,), torch.float32)
    assert fourth.data_ptr() == place and spare.held == 0
    del second, third, fourth
    assert spare.held > 0
    spare.clear()
    assert spare.held == 0


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


def test_threads_take_and_give_at_once() -> None:
    faults: list[str] = []

    def work(mark: int) -> None:
        for i in range(30):
            tensor = room((LARGE + 1000 * (i % 3),), torch.uint8).fill_(mark)
            if not bool((tensor[:: 1 << 12] == mark).all()):
                faults.append(f"{mark} at {i}")

    threads = [threading.Thread(target=work, args=(k + 1,)) for k in range(3)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not faults
    spare.clear()
