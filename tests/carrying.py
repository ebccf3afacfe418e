"""Every cut of a test run: the anatomy that is carried over it must be the one that would be found anew."""

from __future__ import annotations

from itertools import zip_longest
from typing import Any

import pytest

from surgery.core.site import Anatomy
from surgery.model.anatomy import find_anatomy
from surgery.model.dims import Group
from surgery.model.program import Program


def differences(one: Anatomy, other: Anatomy) -> list[str]:
    """What two anatomies say differently, facts included."""
    found = [
        f"{n}: {getattr(one, n)} / {getattr(other, n)}"
        for n in ("stacks", "unresolved", "measures")
        if getattr(one, n) != getattr(other, n)
    ]
    for a, b in ((one.sites, other.sites), (one.modules, other.modules)):
        found += [f"{x.role if x else ''}: {x} / {y}" for x, y in zip_longest(a, b) if x != y or x.facts != y.facts]
    return found


@pytest.fixture(autouse=True, scope="session")
def carried_is_found() -> Any:
    patch = pytest.MonkeyPatch()
    touch = Program.touch

    def checked(self: Program, group: Group | None = None) -> None:
        touch(self, group)
        if self._carry is not None and (anatomy := self._carry()) is not None:
            found = differences(anatomy, find_anatomy(self))
            assert not found, "a cut carried another anatomy than would be found: " + "; ".join(found[:3])

    patch.setattr(Program, "touch", checked)
    yield
    patch.undo()
