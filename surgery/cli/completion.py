"""``surgery completion``: a completion script for bash, zsh or fish, made from the same tables as the help.

The script is complete in itself: pressing tab starts no Python.
"""

from __future__ import annotations

import argparse

from surgery.cli.command import Argument, Command, Option
from surgery.cli.report import result


def _verbs() -> list[Command]:
    from surgery.cli.main import VERBS, command

    return [command(v) for v in VERBS]


def _words(argument: Argument) -> tuple[str, ...]:
    if argument.name == "subject":
        from surgery.cli.explaining import pages
        from surgery.core.catalogue import load

        return (*sorted({n for _, n in load().methods}), *pages())
    return argument.words


def _flags(option: Option) -> list[str]:
    return [f"--{option.name}", *([f"-{option.short}"] if option.short else [])]


def bash() -> str:
    """Completion for bash: verbs, options, values of options, known words; files everywhere else."""
    cases, values = [], []
    seen: set[str] = set()
    for c in _verbs():
        words = [f for o in c.all_options for f in _flags(o)] + ["--help"]
        extra = [w for a in c.arguments for w in _words(a)]
        cases.append(f'    {c.name}) options="{" ".join(words)}"; words="{" ".join(extra)}" ;;')
        for o in c.all_options:
            if o.choices and o.name not in seen:
                seen.add(o.name)
                values.append(f'    --{o.name}) COMPREPLY=($(compgen -W "{" ".join(o.choices)}" -- "$word")); return ;;')
    verbs = " ".join(c.name for c in _verbs())
    return "\n".join([
        "# bash completion for surgery; install: surgery completion bash > ~/.local/share/bash-completion/completions/surgery",
        "_surgery() {",
        '  local word="${COMP_WORDS[COMP_CWORD]}" before="${COMP_WORDS[COMP_CWORD-1]}" options="" words=""',
        "  COMPREPLY=()",
        '  if [ "$COMP_CWORD" -eq 1 ]; then',
        f'    COMPREPLY=($(compgen -W "{verbs} --help --version" -- "$word")); return',
        "  fi",
        '  case "$before" in', *values, "  esac",
        '  case "${COMP_WORDS[1]}" in', *cases, "  esac",
        '  if [[ "$word" == -* ]]; then COMPREPLY=($(compgen -W "$options" -- "$word")); return; fi',
        '  COMPREPLY=($(compgen -W "$words" -- "$word") $(compgen -f -- "$word"))',
        "}",
        "complete -o filenames -F _surgery surgery",
    ]) + "\n"  # fmt: skip


def zsh() -> str:
    """Completion for zsh, with the help texts."""

    def quote(text: str) -> str:
        return text.replace("'", "'\\''").replace("[", "\\[").replace("]", "\\]").replace(":", "\\:")

    blocks = []
    for c in _verbs():
        specs = []
        for o in c.all_options:
            action = f":{o.value}:({' '.join(o.choices)})" if o.choices else f":{o.value}:_files" if o.value else ""
            star = "*" if o.many else ""
            specs += [f"'{star}{flag}[{quote(o.help)}]{action}'" for flag in _flags(o)]
        for a in c.arguments:
            words = _words(a)
            action = f"({' '.join(words)})" if words else "_files" if a.files else " "
            specs.append(f"'{'*' if a.count == '+' else ''}{':' if a.count == '?' else ''}:{a.name}:{action}'")
        blocks.append(f"    {c.name}) _arguments " + " ".join(specs) + " ;;")
    verbs = " ".join(f"'{c.name}:{quote(c.summary)}'" for c in _verbs())
    return "\n".join([
        "#compdef surgery",
        "# zsh completion for surgery; install: surgery completion zsh > a folder of $fpath/_surgery",
        "_surgery() {",
        "  local -a verbs",
        f"  verbs=({verbs})",
        "  if (( CURRENT == 2 )); then _describe verb verbs; return; fi",
        "  local verb=$words[2]",
        "  shift words; (( CURRENT-- ))",
        "  case $verb in", *blocks, "  esac",
        "}",
        'if [ "$funcstack[1]" = "_surgery" ]; then _surgery "$@"; else compdef _surgery surgery; fi',
    ]) + "\n"  # fmt: skip


def fish() -> str:
    """Completion for fish, with the help texts."""

    def quote(text: str) -> str:
        return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"

    lines = [
        "# fish completion for surgery; install: surgery completion fish > ~/.config/fish/completions/surgery.fish",
        "complete -c surgery -n __fish_use_subcommand -l version -d 'the versions that matter'",
    ]
    for c in _verbs():
        lines.append(f"complete -c surgery -n __fish_use_subcommand -f -a {c.name} -d {quote(c.summary)}")
        here = f"complete -c surgery -n '__fish_seen_subcommand_from {c.name}'"
        for o in c.all_options:
            value = f" -x -a {quote(' '.join(o.choices))}" if o.choices else " -r" if o.value else ""
            short = f" -s {o.short}" if o.short else ""
            lines.append(f"{here} -l {o.name}{short}{value} -d {quote(o.help)}")
        for a in c.arguments:
            words = _words(a)
            if words:
                lines.append(f"{here} -a {quote(' '.join(words))}")
    return "\n".join(lines) + "\n"


SHELLS = {"bash": bash, "zsh": zsh, "fish": fish}


def run(args: argparse.Namespace) -> int:
    from surgery.core.diagnostics import fail

    if args.shell not in SHELLS:
        raise fail("S0911", f"no completion for the shell `{args.shell}`", help="bash, zsh and fish are known", exit_code=2)
    result(SHELLS[args.shell]())
    return 0


COMMAND = Command(
    "completion",
    "print a completion script for bash, zsh or fish",
    run,
    (Argument("shell", "bash, zsh or fish", files=False, words=tuple(SHELLS)),),
    examples=('eval "$(surgery completion bash)"', "surgery completion fish > ~/.config/fish/completions/surgery.fish"),
    reports=False,
)
