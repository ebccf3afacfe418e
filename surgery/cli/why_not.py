"""``surgery explain --why-not``: what fused in an emitted file, and why a rule did not."""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path
from typing import Any

import surgery
from surgery.cli.command import FAULT
from surgery.cli.fusion_report import reports
from surgery.core.diagnostics import fail
from surgery.core.near import suggestion

RULES = Path(surgery.__file__).parent / "core" / "fusions.json"

SHOWN = 8
"""Places of one kind that the text lists; the JSON has all."""


@lru_cache(maxsize=1)
def known_rules() -> dict[str, dict[str, Any]]:
    """Name -> record (``name``, ``doc``, ``targets``, ``page``) of every fusion rule, in the order in which they run; empty when the file has
    not been generated."""
    try:
        found = json.loads(RULES.read_text("utf-8"))["rules"]
    except OSError:
        return {}
    return {r["name"]: r for r in found}


def rule_page(name: str) -> str:
    """The page of one rule."""
    return str(known_rules()[name]["page"])


def why_not(subjects: list[str]) -> tuple[str, dict[str, Any]]:
    """Text and JSON for ``[RULE] ARTIFACT``.

    Raises S0911 when there is no artifact among the subjects, S0885 for an unknown rule, and what :func:`reports` raises.
    """
    if len(subjects) > 2:
        raise fail(
            "S0911", "`--why-not` takes a rule and an artifact", help="write `surgery explain --why-not RULE ARTIFACT`", exit_code=FAULT
        )
    *rule, artifact = subjects
    if not rule and artifact in known_rules() and not Path(artifact).exists():
        raise fail(
            "S0911", f"`--why-not {artifact}` does not say in which artifact",
            help=f"write `surgery explain --why-not {artifact} model.onnx`", exit_code=FAULT,
        )  # fmt: skip
    if rule:
        _check(rule[0])
    found = reports(Path(artifact))
    if not rule:
        return _overview(found), {"schema": "surgery.why-not/1", "rule": None, "files": found}
    name = rule[0]
    entries = {file: next((r for r in records if r["rule"] == name), None) for file, records in found.items()}
    text = "\n".join(_one(name, file, entry) for file, entry in entries.items())
    return text, {"schema": "surgery.why-not/1", "rule": name, "files": {f: [] if e is None else [e] for f, e in entries.items()}}


def _check(name: str) -> None:
    if name not in known_rules():
        help, notes = suggestion(name, known_rules(), "rules")
        raise fail(
            "S0885", f"there is no fusion rule `{name}`", notes=notes, help=[*help, "docs/fusions.md lists the rules"], exit_code=FAULT
        )


def _overview(found: dict[str, list[dict[str, Any]]]) -> str:
    lines = []
    for file, records in found.items():
        wide = max(len(r["rule"]) for r in records)
        lines += [file, f"  {'rule':<{wide}}  fired  not fired  first reason"]
        for r in records:
            misses = _misses(r)
            reason = misses[0].get("condition", "") if misses else ""
            lines.append(f"  {r['rule']:<{wide}}  {r.get('fired', 0):>5}  {len(misses):>9}  {reason}".rstrip())
        lines.append("")
    lines.append("`surgery explain --why-not RULE ARTIFACT` names the places of one rule")
    return "\n".join(lines) + "\n"


def _one(name: str, file: str, entry: dict[str, Any] | None) -> str:
    """One rule in one file."""
    rule = known_rules().get(name, {})
    if entry is None:
        targets = ", ".join(rule.get("targets", ()))
        return f"{file}: {name} was not asked; it is a rule for {targets}\n"
    places, misses = [p for p in entry.get("places", ()) if isinstance(p, dict)], _misses(entry)
    fired = int(entry.get("fired", 0))
    lines = [f"{file}: {name} fired at {_count(fired, 'place')}, not at {_count(len(misses), 'place')} that look like it"]
    if not fired and not misses:
        lines.append(f"  nothing in the graph is what it is about: {entry.get('doc') or rule.get('doc', '')}")
    for what, group in _grouped(places, "what").items():
        lines.append(f"  fired: {what} ({len(group)})")
        lines += _places([str(p.get("place", "")) for p in group])
    for condition, group in _grouped(misses, "condition").items():
        lines.append(f"  not fired: {condition} ({len(group)})")
        lines += _places([f"{m.get('node_name', '')}{': ' + str(m['detail']) if m.get('detail') else ''}" for m in group])
    if fired:
        lines.append(
            f"  measured after it: error {entry.get('error', 0.0):.2g} of the output's scale, allowed {entry.get('tolerance', 0.0):.2g}"
        )
    return "\n".join(lines) + "\n"


def _misses(record: dict[str, Any]) -> list[dict[str, Any]]:
    return [m for m in record.get("misses", ()) if isinstance(m, dict)]


def _grouped(items: list[dict[str, Any]], key: str) -> dict[str, list[dict[str, Any]]]:
    out: dict[str, list[dict[str, Any]]] = {}
    for item in items:
        out.setdefault(str(item.get(key, "")), []).append(item)
    return out


def _places(texts: list[str]) -> list[str]:
    more = [f"    and {len(texts) - SHOWN} more (`--format json` has all)"] if len(texts) > SHOWN + 1 else []
    return [f"    {t}" for t in (texts[:SHOWN] if more else texts)] + more


def _count(n: int, word: str) -> str:
    return f"{n} {word}{'' if n == 1 else 's'}"
