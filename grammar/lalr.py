"""The table-driven parser: runs the LALR tables that generate.py derives from surg.lark.

Lark itself takes 50 ms to import and 200 ms to build these tables; reading them back takes about 2 ms.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

from surgery.grammar.lexer import Token

TABLE = Path(__file__).with_name("table.json")
END = "$END"

# What happens to the value of a symbol when its rule is reduced.
DROP, KEEP, SPLICE = 0, 1, 2

Action = Callable[[list[Any], int, int], Any]


@dataclass(frozen=True)
class Rule:
    """``target`` is made of ``size`` symbols; ``action`` is the builder's method, ``""`` for a splice, ``"="`` to pass one on."""

    target: str
    size: int
    action: str
    parts: tuple[tuple[int, int], ...]
    """(position, KEEP or SPLICE) of the symbols whose values go on."""


@dataclass(frozen=True)
class Tables:
    """``rows[state]`` maps a terminal to the next state (>= 0) or to a reduction (-1 - rule), a rule in angle brackets to the state after it."""

    starts: dict[str, int]
    ends: dict[str, int]
    rows: list[dict[str, int]]
    rules: list[Rule]

    @cached_property
    def action_names(self) -> list[str]:
        """The builder's methods that the rules name."""
        return sorted({rule.action for rule in self.rules} - {"", "="})

    @cached_property
    def units(self) -> list[int]:
        """By rule of one symbol: SPLICE when the value stays as it is, KEEP when it becomes a list of one; 0 for other rules."""
        return [
            0 if rule.size != 1 or rule.action not in ("", "=") else SPLICE if rule.action == "=" or rule.parts[0][1] == SPLICE else KEEP
            for rule in self.rules
        ]


@dataclass(frozen=True)
class Stuck:
    """The parser could not go on: ``at`` indexes the token (the end of the piece gives its length)."""

    state: int
    at: int
    terminal: str
    accepts: frozenset[str]


def tables_from(data: dict[str, Any]) -> Tables:
    """Tables from the JSON that generate.py writes."""
    rows = data["rows"]
    rules = [
        Rule(target, len(flags), action, tuple((i, flag) for i, flag in enumerate(flags) if flag))
        for target, action, flags in data["rules"]
    ]
    return Tables(data["starts"], data["ends"], [rows[i] for i in data["states"]], rules)


@cache
def tables() -> Tables:
    """The committed tables, read once."""
    return tables_from(json.loads(TABLE.read_text(encoding="utf-8")))


_NAME_FOLLOWS = frozenset({".", "[", ",", "?"})


class Machine:
    """Parses single statements into the nodes that ``builder``'s methods make of each rule."""

    def __init__(self, builder: object, table: Tables) -> None:
        self.table = table
        named = {name: getattr(builder, name) for name in table.action_names}
        self._actions: list[Action | None] = [named.get(rule.action) for rule in table.rules]

    def run(self, start: str, tokens: Sequence[Token]) -> Any | Stuck:
        """The value of the rule ``start`` over all ``tokens``, or where it got stuck."""
        table = self.table
        rows, rules, actions, units = table.rows, table.rules, self._actions, table.units
        state = table.starts[start]
        final = table.ends[start]
        states = [state]
        values: list[Any] = []
        begins: list[int] = []
        stops: list[int] = []
        count = len(tokens)
        last_end = tokens[-1][3] if count else 0
        for at in range(count + 1):
            token = tokens[at] if at < count else (END, "", last_end, last_end)
            row = rows[state]
            term = token[0]
            if term == "NAME" and token[1] in row:
                # A keyword, unless a name could stand here as well and what follows shows that it is one.
                follows = tokens[at + 1][0] if at + 1 < count else END
                if "NAME" not in row or not (follows in _NAME_FOLLOWS or follows == END):
                    term = token[1]
            while True:
                target = row.get(term)
                if target is None:
                    return Stuck(state, at, term, frozenset(key for key in row if key[0] != "<" and self._goes_on(states, key, final)))
                if target >= 0:
                    break
                rule = rules[-1 - target]
                unit = units[-1 - target]
                if unit:
                    # More than half of all reductions rename one symbol: nothing moves but the state.
                    if unit == KEEP:
                        values[-1] = [values[-1]]
                    states[-1] = state = rows[states[-2]][rule.target]
                    if state == final and term == END:
                        return values[-1]
                    row = rows[state]
                    continue
                size = rule.size
                begin, stop = begins[-size], stops[-1]
                action = actions[-1 - target]
                parts = rule.parts
                if parts and parts[0][1] == SPLICE:
                    # The first spliced list is taken over, not copied: long lists stay linear.
                    children = values[parts[0][0] - size]
                    parts = parts[1:]
                else:
                    children = []
                for position, flag in parts:
                    if flag == KEEP:
                        children.append(values[position - size])
                    else:
                        children.extend(values[position - size])
                value = children if action is None else action(children, begin, stop)
                del states[-size:], values[-size:], begins[-size:], stops[-size:]
                states.append(rows[states[-1]][rule.target])
                values.append(value)
                begins.append(begin)
                stops.append(stop)
                state = states[-1]
                if state == final and term == END:
                    return value
                row = rows[state]
            state = target
            states.append(state)
            values.append(token)
            begins.append(token[2])
            stops.append(token[3])
        raise AssertionError("the end of a statement is never shifted")

    def _goes_on(self, states: list[int], term: str, final: int) -> bool:
        """Whether ``term`` could really come next: LALR rows also reduce on what only other contexts can continue."""
        rows, rules = self.table.rows, self.table.rules
        states = list(states)
        while True:
            target = rows[states[-1]].get(term)
            if target is None:
                return False
            if target >= 0:
                return True
            rule = rules[-1 - target]
            del states[-rule.size :]
            states.append(rows[states[-1]][rule.target])
            if states[-1] == final and term == END:
                return True
