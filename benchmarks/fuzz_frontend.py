"""Fuzzes the front end: parser, formatter and checker must give diagnostics or success for any text, never a traceback.

Inputs come in four kinds in turn: random characters, token soup, specs of specs/ and docs/ with random edits, and two
specs spliced together. Input number i of a seed is always the same, so a run can be split and resumed:

    python benchmarks/fuzz_frontend.py --count 1000000 --seed 1 --state build/fuzz.json --processes 2

Every failure is printed with its input number and written to --failures; `--only N` runs one input again.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import random
import re
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from surgery.core.diagnostics import SurgeryError  # noqa: E402
from surgery.core.printer import to_text  # noqa: E402
from surgery.core.source import Source  # noqa: E402
from surgery.grammar.formatter import format_text  # noqa: E402
from surgery.grammar.parser import parse  # noqa: E402
from surgery.grammar.words import CLAUSES, STATEMENTS  # noqa: E402

try:
    from surgery.front import check_source
except ImportError:
    check_source = None  # type: ignore[assignment]

SOUP = [
    *STATEMENTS, *CLAUSES, *"(){}[],.:=*?@#;'\"%-+/\\", "..", "**", "<=", ">=", "==", "\n", "\n", "\n  ", " ", "\t", "\r\n", "own", "base", "by",
    "layers", "attn", "q", "lora", "rank", "r", "8", "-1", "0.5", "30%", "1.1B", "2GiB", "1e-4", "2q", '"s"', '"a.*.b"', '"\\q"', "\0", "é",
    "## doc\n", "# c\n", "surg 1\n", "layers[*].attn.{q, v}", "lora(rank = 8)", "\u2028", "𝔘",
]  # fmt: skip


def corpus() -> list[str]:
    """Valid specs to mutate: the files of specs/ and the snippets of the documentation."""
    texts = [path.read_text(encoding="utf-8") for path in sorted((ROOT / "specs").rglob("*.surg"))]
    for page in [ROOT / "docs/language.md", *sorted((ROOT / "docs/errors").glob("*.md"))]:
        texts += re.findall(r"^```surg[^\n]*\n(.*?)^```", page.read_text(encoding="utf-8"), re.S | re.M)
    return texts


def generate(number: int, seed: int, texts: list[str]) -> str:
    """Input ``number`` of ``seed``."""
    rng = random.Random(f"{seed}:{number}")
    kind = number % 4
    if kind == 0:
        top = rng.choice((0x7F, 0xFF, 0x2FFF))
        return "".join(chr(rng.randint(0, top)) for _ in range(rng.randint(0, 120)))
    if kind == 1:
        return ("surg 1\n" if rng.random() < 0.5 else "") + rng.choice(("", " ")).join(rng.choices(SOUP, k=rng.randint(0, 60)))
    text = rng.choice(texts)
    if kind == 3:
        other = rng.choice(texts)
        return text[: rng.randint(0, len(text))] + other[rng.randint(0, len(other)) :]
    for _ in range(rng.randint(1, 6)):
        at = rng.randint(0, len(text))
        end = min(len(text), at + rng.choice((0, 0, 1, 1, 3, 12)))
        new = rng.choice(("", rng.choice(SOUP), rng.choice(SOUP), chr(rng.randint(0, 0x17F)), text[end : end + 8]))
        text = text[:at] + new + text[end:]
    return text


def run_one(text: str) -> str:
    """``ok`` or ``diagnosed``; raises whatever the front end raises by mistake, or AssertionError for a broken law."""
    source = Source("fuzz.surg", text)
    tree, problems = parse(source)
    for problem in problems:
        assert 0 <= problem.span.start <= problem.span.end <= len(text), "a span outside the text"
    formatted, _ = format_text(source)
    if not problems:
        again, others = parse(Source("fuzz.surg", formatted))
        assert not others and again == tree, "the formatter changed the meaning"
        assert format_text(Source("fuzz.surg", formatted))[0] == formatted, "the formatter is not idempotent"
        printed, others = parse(Source("fuzz.surg", to_text(tree)))
        assert not others and printed == tree, "the printer changed the meaning"
    if check_source is not None:
        try:
            found = check_source(source)[1]
        except SurgeryError as fault:
            found = list(fault.diagnostics)
        assert not any(d.code == "S0901" for d in found), "an internal fault was reported"
        problems = problems or [d for d in found if d.is_error]
    return "diagnosed" if problems else "ok"


@dataclass
class Outcome:
    results: Counter[str] = field(default_factory=Counter)
    failures: list[tuple[int, str]] = field(default_factory=list)


_TEXTS: list[str] = []


def run_block(block: tuple[int, int, int]) -> Outcome:
    """Inputs ``[first, last)`` of a seed."""
    first, last, seed = block
    if not _TEXTS:
        _TEXTS.extend(corpus())
    outcome = Outcome()
    for number in range(first, last):
        try:
            outcome.results[run_one(generate(number, seed, _TEXTS))] += 1
        except Exception:
            outcome.results["failed"] += 1
            outcome.failures.append((number, traceback.format_exc()))
    return outcome


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--state", type=Path, help="progress is kept here, and a run goes on from it")
    parser.add_argument("--failures", type=Path, help="failing inputs are appended here, one JSON object a line")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--only", type=int, help="run this input and show it")
    args = parser.parse_args()
    if args.only is not None:
        text = generate(args.only, args.seed, corpus())
        print(repr(text))
        print(run_one(text))
        return 0

    results: Counter[str] = Counter()
    start = 0
    if args.state and args.state.exists():
        kept = json.loads(args.state.read_text())
        if kept["seed"] == args.seed:
            start, results = kept["done"], Counter(kept["results"])
    size = 1000
    blocks = [(first, min(first + size, args.count), args.seed) for first in range(start, args.count, size)]
    began = time.monotonic()
    texts = corpus()
    with multiprocessing.Pool(args.processes) as pool:
        run: Callable[..., object] = pool.imap
        for block, outcome in zip(blocks, run(run_block, blocks), strict=True):  # type: ignore[call-overload]
            results.update(outcome.results)
            for number, trace in outcome.failures:
                print(f"input {number}:\n{trace}", file=sys.stderr)
                if args.failures:
                    with args.failures.open("a") as out:
                        out.write(json.dumps({"number": number, "seed": args.seed, "text": generate(number, args.seed, texts)}) + "\n")
            if args.state:
                args.state.parent.mkdir(parents=True, exist_ok=True)
                args.state.write_text(json.dumps({"seed": args.seed, "done": block[1], "results": dict(results)}))
    seconds = time.monotonic() - began
    done = args.count - start
    stages = "parser, printer, formatter" + (", checker" if check_source else "")
    print(
        f"{sum(results.values())} inputs through {stages}: {dict(sorted(results.items()))}; {seconds:.0f} s, {done / max(seconds, 1e-9):.0f} inputs/s"
    )
    return 1 if results["failed"] else 0


if __name__ == "__main__":
    raise SystemExit(main())
