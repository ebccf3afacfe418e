"""The lock file ``name.surg.lock``: what a spec was resolved to, so that a later run can refuse drift.

JSON with sorted keys; no dates, no absolute paths: the same inputs give the same bytes.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from surgery.core.diagnostics import Diagnostic, error, fail
from surgery.core.source import Span

SCHEMA = "surgery.lock/1"
ANEW = "delete it and compile once without --locked"


@dataclass(frozen=True)
class Lock:
    """``model``: ref, hash (config and tensor headers) and content (every byte of the weight files); ``data``: content hash by name; ``seeds`` and ``methods`` (name -> version) by statement;
    ``sites``: for each operation the roles it resolved to; ``weights``: digest of every output weight's expression."""

    spec: str
    edition: int
    model: dict[str, str]
    data: dict[str, str] = field(default_factory=dict)
    params: dict[str, str] = field(default_factory=dict)
    seeds: dict[str, int] = field(default_factory=dict)
    methods: dict[str, int] = field(default_factory=dict)
    sites: dict[str, list[str]] = field(default_factory=dict)
    weights: str = ""

    def to_text(self) -> str:
        body = {"schema": SCHEMA, **{k: getattr(self, k) for k in self.__dataclass_fields__}}
        return json.dumps(body, indent=1, sort_keys=True, ensure_ascii=False) + "\n"


def lock_path(spec: Path) -> Path:
    return spec.with_name(spec.name + ".lock")


def read_lock(path: Path, span: Span | None = None) -> Lock:
    """``span`` is what errors point at. Raises S0405 for a missing lock and S0406 for one that is not a lock of this version."""
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise fail(
            "S0405", f"there is no lock file {path.name}", span, "not locked yet", help="compile once without --locked to write it"
        ) from None
    except (OSError, ValueError, RecursionError) as exc:
        raise fail("S0406", f"{path.name} is not a lock file: {exc}", span, help=ANEW) from None
    fields = set(Lock.__dataclass_fields__)
    shapes: dict[str, type] = {
        "spec": str, "edition": int, "model": dict, "data": dict, "params": dict, "seeds": dict, "methods": dict, "sites": dict, "weights": str,
    }  # fmt: skip
    if not isinstance(raw, dict) or raw.get("schema") != SCHEMA or not fields <= set(raw):
        raise fail("S0406", f"{path.name} is not a lock file of schema {SCHEMA}", span, help=ANEW)
    if any(not isinstance(raw[k], t) for k, t in shapes.items()):
        raise fail("S0406", f"{path.name} has fields of the wrong type", span, help=ANEW)
    return Lock(**{k: raw[k] for k in fields})


def drift(old: Lock, new: Lock, span: Span | None = None) -> list[Diagnostic]:
    """One S0407, at ``span``, for each thing that is no longer as locked; empty when nothing drifted."""
    found: list[str] = []

    def compare(what: str, a: dict[str, Any], b: dict[str, Any]) -> None:
        for key in sorted(set(a) | set(b)):
            old, new = a.get(key), b.get(key)
            if old != new and isinstance(old, list) and isinstance(new, list):
                found.append(f"{what} `{key}`: {_moved(old, new)}")
            elif old != new:
                found.append(f"{what} `{key}`: locked {_short(old)}, now {_short(new)}")

    if old.edition != new.edition:
        found.append(f"edition: locked {old.edition}, now {new.edition}")
    # the reference is for readers: the same model may be called by another path on another machine
    compare("model", {**old.model, "ref": ""}, {**new.model, "ref": ""})
    compare("data", old.data, new.data)
    compare("param", old.params, new.params)
    compare("seed of", old.seeds, new.seeds)
    compare("version of", old.methods, new.methods)
    compare("sites of", old.sites, new.sites)
    if not found and old.weights != new.weights:
        found.append(f"weights: locked expressions {_short(old.weights)}, now {_short(new.weights)}")
    if not found:
        return []
    return [
        error(
            "S0407", f"{old.spec} no longer resolves to what its lock file says", span, "not as locked", notes=tuple(found),
            help="review the change, then compile without --locked to write the lock again",
        )
    ]  # fmt: skip


def _moved(old: list[Any], new: list[Any]) -> str:
    """What two lists of sites do not share."""
    gone, come = [s for s in old if s not in new], [s for s in new if s not in old]
    parts = [f"{verb} {', '.join(map(str, some[:4]))}" + (f" and {len(some) - 4} more" if len(some) > 4 else "")
             for verb, some in (("no longer", gone), ("now also", come)) if some]  # fmt: skip
    return "; ".join(parts) or "another order"


def _short(value: Any) -> str:
    if value is None:
        return "nothing"
    if isinstance(value, list):
        return f"{len(value)} sites"
    text = str(value)
    return text if len(text) <= 40 else text[:16] + "..."
