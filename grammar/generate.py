"""Makes table.json from surg.lark.

Run by ``python -m surgery.dev generate``; a test checks that the committed file is what :func:`render` gives. Lark is
imported here only.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from surgery.grammar.lalr import DROP, KEEP, SPLICE

GRAMMAR = Path(__file__).with_name("surg.lark")
STARTS = ("simple", "stage_head")


def grammar_parser(*, strict: bool = False, starts: tuple[str, ...] = ("file", *STARTS)) -> Any:
    """Lark's own parser of surg.lark: the reference that the tests compare with (``strict`` needs interegular)."""
    from lark import Lark

    return Lark(
        GRAMMAR.read_text(encoding="utf-8"), parser="lalr", lexer="contextual", strict=strict, start=list(starts), maybe_placeholders=False
    )


def _tables() -> dict[str, Any]:
    from lark.lexer import PatternStr
    from lark.parsers.lalr_analysis import Shift

    lark = grammar_parser(starts=STARTS)
    table = lark.parser.parser._parse_table
    # Keywords and punctuation go by their own text, so that tables and messages read as the language does.
    # Rules stand in angle brackets, for `model` is both a keyword and a rule.
    spelled = {"$END": "$END"} | {t.name: t.pattern.value if isinstance(t.pattern, PatternStr) else t.name for t in lark.terminals}

    rules: list[Any] = []
    numbers: dict[Any, int] = {}

    def number(rule: Any) -> int:
        if rule not in numbers:
            flags = []
            for symbol in rule.expansion:
                if symbol.is_term:
                    dropped = symbol.filter_out and not rule.options.keep_all_tokens
                    flags.append(DROP if dropped else KEEP)
                else:
                    flags.append(SPLICE if symbol.name.startswith("_") else KEEP)
            target = rule.origin.name
            if target.startswith("_"):
                action = ""
            elif rule.options.expand1 and not rule.alias and flags.count(KEEP) == 1 and SPLICE not in flags:
                action = "="
            else:
                action = rule.alias or target
            numbers[rule] = len(rules)
            rules.append([f"<{target}>", action, flags])
        return numbers[rule]

    # Number the states in the order of a walk from the starts, so that the file does not depend on Lark's own numbers.
    order: dict[int, int] = {}
    todo = [table.start_states[start] for start in STARTS]
    while todo:
        state = todo.pop(0)
        if state in order:
            continue
        order[state] = len(order)
        todo += [arg for _, (action, arg) in sorted(table.states[state].items()) if action is Shift]
    rows: list[dict[str, int]] = []
    seen: dict[str, int] = {}
    states: list[int] = []
    for state in order:
        row = {
            spelled.get(name, f"<{name}>"): order[arg] if action is Shift else -1 - number(arg)
            for name, (action, arg) in sorted(table.states[state].items())
        }
        key = json.dumps(row)
        if key not in seen:
            seen[key] = len(rows)
            rows.append(row)
        states.append(seen[key])
    return {
        "starts": {start: order[table.start_states[start]] for start in STARTS},
        "ends": {start: order[table.end_states[start]] for start in STARTS},
        "rules": rules,
        "states": states,
        "rows": rows,
    }


def render() -> dict[str, str]:
    """The generated files: path in the repository to content."""
    data = _tables()
    parts = []
    for key, value in data.items():
        if key in ("rows", "rules"):
            lines = ",\n".join(json.dumps(item, separators=(",", ":"), ensure_ascii=False) for item in value)
            parts.append(f'"{key}":[\n{lines}\n]')
        else:
            parts.append(f'"{key}":{json.dumps(value, separators=(",", ":"), ensure_ascii=False)}')
    return {"grammar/table.json": "{\n" + ",\n".join(parts) + "\n}\n"}


if __name__ == "__main__":
    for path, content in render().items():
        (Path(__file__).resolve().parent.parent / path).write_text(content, encoding="utf-8")
