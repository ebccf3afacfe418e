"""Units of literals: what they scale by, which dimension they have, and how numbers read in messages."""

from __future__ import annotations

from decimal import Decimal
from typing import Literal

Dimension = Literal["count", "share", "bytes", ""]

COUNTS: dict[str, int] = {"k": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}
"""Decimal counts: ``1.1B`` is 1.1 billion."""

BYTES: dict[str, int] = {
    "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
    "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40,
}  # fmt: skip
"""Byte sizes. A bare ``B`` is the count billion, so bytes have no one-letter unit."""

SHARES: dict[str, Decimal] = {"%": Decimal("0.01")}

UNITS: tuple[str, ...] = (*SHARES, *COUNTS, *BYTES)
"""Every unit of edition 1, in the order in which messages list them."""


def dimension(unit: str) -> Dimension:
    """``count``, ``share`` or ``bytes``; empty for no unit and for a unit that does not exist."""
    if unit in COUNTS:
        return "count"
    if unit in SHARES:
        return "share"
    return "bytes" if unit in BYTES else ""


def scale(digits: str, unit: str) -> int | float:
    """Value of a literal: ``("30", "%")`` is 0.3, ``("1.1", "B")`` is 1100000000, ``("1e-4", "")`` is 0.0001.

    The scaling is decimal, so ``30%`` equals ``0.3`` exactly. Counts and bytes are whole numbers where the literal
    gives a whole number. Raises ``KeyError`` for an unknown unit and ``OverflowError`` for what no float holds.
    """
    exact = Decimal(digits)
    if not unit:
        if digits.lstrip("-").isdigit():
            return int(digits)
        return _as_float(exact)
    if unit in SHARES:
        return _as_float(exact * SHARES[unit])
    factor = COUNTS[unit] if unit in COUNTS else BYTES[unit]
    scaled = exact * factor
    if abs(scaled) < 10**18 and scaled == scaled.to_integral_value():
        return int(scaled)
    return _as_float(scaled)


def _as_float(value: Decimal) -> float:
    result = float(value)
    if result in (float("inf"), float("-inf")):
        raise OverflowError(f"{value} is beyond the largest number that can be held")
    return result


def plain(value: int | float) -> str:
    """Shortest literal of the language, without a unit, that reads back as ``value`` (a finite number)."""
    if isinstance(value, int):
        return str(value)
    return repr(value)


def _short(value: float, digits: int) -> str:
    text = f"{value:.{digits}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def format_count(value: int | float, digits: int = 2) -> str:
    """``1100000000`` reads ``1.1B``; below 10000 the number itself. At most ``digits`` decimals."""
    if abs(value) < 10_000:
        return _short(float(value), digits)
    chosen, factor = "k", 10**3
    for name, size in COUNTS.items():
        if abs(round(value / size, digits)) >= 1:
            chosen, factor = name, size
    return _short(value / factor, digits) + chosen


def format_exact(value: int) -> str:
    """``1100000000`` reads ``1,100,000,000``: for messages in which every unit matters."""
    return f"{value:,}"


def format_bytes(value: int | float, digits: int = 2) -> str:
    """Bytes in binary units: ``2147483648`` reads ``2GiB``; below 1 KiB ``512 bytes``."""
    if abs(value) < 1024:
        return f"{_short(float(value), 0)} byte{'' if value == 1 else 's'}"
    chosen, factor = "KiB", 2**10
    for name in ("MiB", "GiB", "TiB"):
        if abs(round(value / BYTES[name], digits)) >= 1:
            chosen, factor = name, BYTES[name]
    return _short(value / factor, digits) + chosen


def format_share(value: float, digits: int = 2) -> str:
    """``0.005`` reads ``0.5%``; tiny shares keep two significant digits."""
    percent = value * 100
    if percent and abs(percent) < 10**-digits:
        return f"{percent:.1e}%"
    return _short(percent, digits) + "%"


def format_value(value: int | float, unit: str) -> str:
    """A number in the dimension of ``unit``, as messages show it."""
    kind = dimension(unit)
    if kind == "share":
        return format_share(value)
    return format_bytes(value) if kind == "bytes" else format_count(value)
