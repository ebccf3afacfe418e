"""The words of the language by their place, and near names."""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache

EDITIONS = (1,)
"""The editions that this version reads."""

VERBS = ("adapt", "insert", "prune", "share", "convert", "replace", "factorize", "skip", "freeze", "unfreeze", "fold")

STATEMENTS = (
    "surg", "import", "param", "let", "model", "data", "adapter", "checkpoint", *VERBS,
    "merge", "train", "expect", "measure", "emit", "stage",
)  # fmt: skip
"""What a statement can begin with."""

PLACES = ("on", "after", "before", "beside")

CLAUSES = (*PLACES, "using", "keep", "except", "as", "of", "for", "within", "select", "to")
"""What can continue a statement on a new line."""

STATEMENT_SET = frozenset(STATEMENTS)
CLAUSE_SET = frozenset(CLAUSES)


def near(word: str, known: Iterable[str], limit: int = 4) -> list[str]:
    """Up to ``limit`` of ``known`` that look like ``word``, best first."""
    return list(_near(word, tuple(known), limit))


@lru_cache(maxsize=4096)
def _near(word: str, known: tuple[str, ...], limit: int) -> list[str]:
    from surgery.core.near import near as nearest

    # Very long words are no typos, and matching them would cost.
    return nearest(word, known, limit) if len(word) <= 32 else []
