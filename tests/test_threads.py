"""How many threads a thread computes on."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import torch

from surgery.model.threads import alone


def test_a_thread_stays_alone_when_another_sets_the_number_before_its_first_work() -> None:
    before = torch.get_num_threads()
    try:
        for wanted in (2, 3):
            with ThreadPoolExecutor(1, initializer=alone) as pool:
                pool.submit(int).result()  # the thread is there, and has not computed
                torch.set_num_threads(wanted)
                assert pool.submit(torch.get_num_threads).result() == 1
            assert torch.get_num_threads() == wanted
    finally:
        torch.set_num_threads(before)
