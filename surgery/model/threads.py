"""Arithmetic that does not depend on how many threads the machine has."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def one_thread() -> Iterator[None]:
    """Run torch on one thread: sums of products are then added in one order, whatever the machine.

    A matrix product that several threads share is cut into as many blocks, and each cut adds in another order. Everything whose
    numbers reach an output goes through here: products in weights, methods' own functions, and the forward passes that claims
    are measured on.
    """
    before = torch.get_num_threads()
    if before == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def alone() -> None:
    """In a thread of its own, before its first work: it computes on itself alone from now on.

    A thread takes over the number that was set last anywhere, when it first computes: so it is asked for first, and cannot come from another
    thread between this and the work.
    """
    torch.get_num_threads()
    torch.set_num_threads(1)
