"""Near names: what somebody probably meant, taken from what really exists."""

from __future__ import annotations

from collections.abc import Iterable


def distance(a: str, b: str, limit: int = 99) -> int:
    """Number of inserted, deleted, changed or swapped neighbouring characters between two words (optimal string alignment).

    Gives ``limit + 1`` as soon as the result is known to be larger than ``limit``.
    """
    if abs(len(a) - len(b)) > limit:
        return limit + 1
    before: list[int] = []
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        older, before, row = before, row, [i]
        for j, y in enumerate(b, 1):
            best = min(before[j] + 1, row[j - 1] + 1, before[j - 1] + (x != y))
            if i > 1 and j > 1 and x == b[j - 2] and a[i - 2] == y:
                best = min(best, older[j - 2] + 1)
            row.append(best)
        if min(row) > limit:
            return limit + 1
    return row[-1]


def near(word: str, known: Iterable[str], count: int = 4) -> list[str]:
    """Up to ``count`` of the known words that are close to ``word``, nearest first, ties in alphabetical order.

    Close is: at most a third of the letters differ (at least one, two from four letters on), or one word begins with the other, or
    they differ only in case and in ``-`` against ``_``.
    """
    if len(word) > 80:
        return []
    plain = word.lower().replace("-", "_")
    limit = max(1 if len(plain) < 4 else 2, len(plain) // 3)
    ranked: list[tuple[int, str]] = []
    for other in dict.fromkeys(known):
        folded = other.lower().replace("-", "_")
        steps = distance(plain, folded, limit)
        if steps > limit and len(plain) >= 2 and (folded.startswith(plain) or plain.startswith(folded)) and len(folded) >= 2:
            steps = limit + 1
        elif steps > limit or steps >= max(len(plain), len(folded)):
            continue
        ranked.append((steps, other))
    return [other for _, other in sorted(ranked)[:count]]


def quoted(words: Iterable[str], last: str = "or") -> str:
    """``a``, ``b`` or ``c`` in backticks."""
    items = [f"`{w}`" for w in words]
    if len(items) < 2:
        return "".join(items)
    return f"{', '.join(items[:-1])} {last} {items[-1]}"


def suggestion(word: str, known: Iterable[str], what: str, limit: int = 12) -> tuple[list[str], list[str]]:
    """Help and notes for an unknown name: near names as help, and when there is none (or few exist) the list of all as a note."""
    names = list(dict.fromkeys(known))
    close = near(word, names)
    help = [f"did you mean {quoted(close)}?"] if close else []
    if not names:
        return help, [f"{what}: none yet"]
    shown = sorted(names)
    more = f" and {len(shown) - limit} more" if len(shown) > limit else ""
    notes = [] if close and len(names) > limit else [f"{what}: {', '.join(shown[:limit])}{more}"]
    return help, notes
