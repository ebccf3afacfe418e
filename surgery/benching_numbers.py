"""What ``surgery bench`` reads from its command line. No torch."""

from __future__ import annotations

from surgery.benching_arms import EXTRA_ARMS
from surgery.core.diagnostics import fail

MOST = 1 << 16
"""Upper bound of batches, lengths and rounds: what is larger is a slip of the keyboard."""


def number(text: str, option: str) -> int:
    """A count from 1. Raises S0899."""
    try:
        value = int(text.strip())
    except ValueError:
        raise fail("S0899", f"`--{option} {text}` is not a number", help=f"write for example `--{option} 8`", exit_code=2) from None
    return within(value, option)


def within(value: int, option: str) -> int:
    """``value`` itself when it is from 1 to :data:`MOST`; raises S0899."""
    if not 1 <= value <= MOST:
        raise fail("S0899", f"`{option}` must be from 1 to {MOST:,}, not {value:,}", help=f"write for example `--{option} 8`", exit_code=2)
    return value


def numbers(text: str, option: str) -> list[int]:
    """``"1,8"`` as counts, in their order, each once. Raises S0899."""
    return list(dict.fromkeys(number(part, option) for part in text.split(",")))


def names(text: str) -> list[str]:
    """``"eager,plain"`` as arms, ``none`` as no arm. Raises S0899 for one that there is not."""
    found = [part.strip() for part in text.split(",") if part.strip()]
    return checked_arms([] if found == ["none"] else found)


def checked_arms(found: list[str]) -> list[str]:
    unknown = [a for a in found if a not in EXTRA_ARMS]
    if unknown:
        raise fail("S0899", f"there is no arm `{unknown[0]}`", help=f"the arms of a module are {', '.join(EXTRA_ARMS)}", exit_code=2)
    return list(dict.fromkeys(found))
