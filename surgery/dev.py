"""``python -m surgery.dev generate [--check]``: every file that is made from the code.

The method catalogue, the pages of methods and of fusion rules, the reference of the command line, the index of errors with its packaged copy, and the
grammar's tables. ``--check`` writes nothing and exits with 1 when a file is stale. For a checkout; imports torch.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable
from pathlib import Path

import surgery
from surgery.core import catalogue
from surgery.core.diagnostics import SurgeryError
from surgery.core.method import MethodInfo

ROOT = Path(surgery.__file__).resolve().parent.parent
MADE = "<!-- made by `python -m surgery.dev generate`; edit the code, not this page -->\n\n"
CODE = re.compile(r"S0[1-9]\d\d")

FAMILIES = {
    "S01": "Syntax", "S02": "Names, parameters and units", "S03": "Selectors", "S04": "Order and conflicts", "S05": "Capture and graph",
    "S06": "Expectations", "S07": "Weights and data", "S08": "Emission", "S09": "Command line and internal faults",
}  # fmt: skip


def generated() -> dict[Path, str]:
    """Every made file and its text."""
    from surgery.passes import registry

    infos = registry.catalogue()
    out = {ROOT / "surgery/core/catalogue.json": catalogue.render(infos)}
    out |= method_pages(infos)
    out[ROOT / "docs/cli.md"] = cli_page()
    pages = error_pages()
    out[ROOT / "docs/errors/README.md"] = error_index(pages)
    out[ROOT / "surgery/core/errors.json"] = json.dumps({"schema": "surgery.errors/1", "pages": pages}, indent=1, ensure_ascii=False) + "\n"
    out |= grammar_files()
    out |= fusion_files()
    return out


def fusion_files() -> dict[Path, str]:
    """The pages of the fusion rules, for readers and packaged for ``explain``."""
    import inspect

    from surgery.backends.fuse.engine import rules

    packaged, lines = [], ["# Fusion rules", "", MADE.strip(), ""]
    lines += [
        "`emit onnx` and `emit pt2` run these rules, in this order, unless they are told `optimize = none`. After each rule the graph must still compute",
        "what it computed before, on random, padded and cached inputs; what breaks that is taken back. `surgery explain --why-not RULE FILE` says where a",
        "rule fired in an emitted file and, for each place that it left alone, the first condition that did not hold.",
        "",
    ]
    for rule in rules():
        text = inspect.cleandoc(type(rule).__doc__ or "").replace("``", "`").strip()
        own = [f"{rule.doc[0].upper()}{rule.doc[1:]}.", "", *text.splitlines(), "", f"For: {', '.join(sorted(rule.targets))}."]
        packaged.append(
            {
                "name": rule.name,
                "doc": rule.doc,
                "targets": sorted(rule.targets),
                "page": "\n".join([f"# fusion {rule.name}", "", *own]) + "\n",
            }
        )
        lines += [f"## {rule.name}", "", *own, ""]
    data = {"schema": "surgery.fusion-rules/1", "rules": packaged}
    return {
        ROOT / "docs/fusions.md": "\n".join(lines).rstrip() + "\n",
        ROOT / "surgery/core/fusions.json": json.dumps(data, indent=1, ensure_ascii=False) + "\n",
    }


def method_pages(infos: Iterable[MethodInfo]) -> dict[Path, str]:
    """One page a method and their index."""
    from surgery.cli.pages import method_page

    folder = ROOT / "docs/methods"
    index = ["# Methods", "", MADE.strip(), ""]
    out: dict[Path, str] = {}
    verb = ""
    for info in sorted(infos, key=lambda m: (catalogue.METHOD_VERBS.index(m.verb), m.name)):
        if info.verb != verb:
            verb = info.verb
            index += ["", f"## {verb}", "", "| method | what |", "|---|---|"]
        name = f"{info.verb}-{info.name}.md"
        index.append(f"| [{info.name}]({name}) | {info.summary.replace('|', '/')} |")
        out[folder / name] = MADE + method_page(info)
    out[folder / "README.md"] = re.sub(r"\n{3,}", "\n\n", "\n".join(index)) + "\n"
    return out


def cli_page() -> str:
    """The reference of the command line."""
    from surgery.cli.main import GROUPS, command

    lines = ["# Command line", "", MADE.strip(), ""]
    lines += [
        "Exit codes, the same for every verb and every format: 0 fine, 1 findings (an error, a failed expectation, an unformatted file, a stale lock, a",
        "difference over the threshold), 2 usage, input/output or internal fault, 130 interrupted. Diagnostics go to the standard error, results to the",
        "standard output; `--format json` and `sarif` write one document with both to the standard output.",
        "",
    ]
    for _, verbs in GROUPS:
        for verb in verbs:
            c = command(verb)
            usage = " ".join(["surgery", c.name, *(_usage(a.name, a.count) for a in c.arguments), "[options]"])
            lines += [f"## {c.name}", "", (c.description or c.summary[0].upper() + c.summary[1:] + "."), "", "```text", usage, "```", ""]
            lines += ["| argument or option | meaning |", "|---|---|"]
            lines += [f"| `{a.name.upper()}` | {a.help} |" for a in c.arguments]
            for o in c.all_options:
                flag = f"`--{o.name}{' ' + o.value if o.value else ''}`" + (f", `-{o.short}`" if o.short else "")
                more = (f"; one of {', '.join(o.choices)}" if o.choices else "") + ("; may be repeated" if o.many else "")
                more += f"; default {o.default}" if o.default is not None else ""
                lines.append(f"| {flag} | {o.help.replace('|', '/')}{more} |")
            lines.append("")
            if c.examples:
                lines += ["```sh", *c.examples, "```", ""]
    return "\n".join(lines).rstrip() + "\n"


def _usage(name: str, count: str) -> str:
    upper = name.upper()
    return {"?": f"[{upper}]", "+": f"{upper}..."}.get(count, upper)


def error_pages() -> dict[str, str]:
    """Code -> page, sorted."""
    files = sorted((ROOT / "docs/errors").glob("S[0-9][0-9][0-9][0-9].md"))
    return {f.stem: f.read_text("utf-8") for f in files}


def error_index(pages: dict[str, str]) -> str:
    lines = [
        "# Errors",
        "",
        MADE.strip(),
        "",
        "Each page shows a wrong example, what surgery says, and a right one; the tests run them. Codes are never reused.",
        "",
    ]
    for family, title in FAMILIES.items():
        mine = {c: p for c, p in pages.items() if c.startswith(family)}
        if mine:
            lines += [f"## {family} {title}", "", "| code | meaning |", "|---|---|"]
            lines += [f"| [{c}]({c}.md) | {p.splitlines()[0].partition(': ')[2].replace('|', '/')} |" for c, p in mine.items()]
            lines.append("")
    return "\n".join(lines).rstrip() + "\n"


def grammar_files() -> dict[Path, str]:
    """The grammar's tables: ``surgery.grammar.generate.render()`` gives paths in the checkout and their texts."""
    from surgery.grammar import generate

    return {ROOT / name: text for name, text in generate.render().items()}


def stale(files: dict[Path, str]) -> list[Path]:
    """Files that differ from what the code gives, and method pages of methods that are gone."""
    old = [p for p, text in files.items() if not p.is_file() or p.read_text("utf-8") != text]
    return old + [p for p in sorted((ROOT / "docs/methods").glob("*.md")) if p not in files]


def main(argv: list[str]) -> int:
    if argv[:1] != ["generate"] or argv[1:] not in ([], ["--check"]):
        print("usage: python -m surgery.dev generate [--check]", file=sys.stderr)
        return 2
    try:
        files = generated()
    except SurgeryError as e:
        print(e, file=sys.stderr)
        return 2
    old = stale(files)
    for path in old:
        name = path.relative_to(ROOT)
        if "--check" in argv:
            print(f"stale: {name}")
        elif path in files:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(files[path], "utf-8")
            print(f"wrote {name}")
        else:
            path.unlink()
            print(f"removed {name}")
    return 1 if old and "--check" in argv else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
