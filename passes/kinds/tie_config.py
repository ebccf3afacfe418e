"""Ties that end: the config and the anatomy follow the graph.

The one rule for tied embeddings: the head and the token embedding are tied while they are one tensor of the program. So the graph, the
stored tensors and an ONNX file agree by themselves; what else says it, the config's ``tie_word_embeddings``, is written here.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import replace

from surgery.model.program import Program
from surgery.passes.kinds.calls import weight_names


def settle(program: Program, before: Mapping[str, str]) -> None:
    """After a pass: ``before`` are the aliases as they were. Where a tie is gone, sites have weights of their own again, and a head that
    left its embedding is said to be untied."""
    if all(program.aliases.get(name) == first for name, first in before.items()):
        return
    was = _head_and_tokens(program, before)
    now = _head_and_tokens(program, program.aliases)
    program.touch()
    if was is None or now is None or was[0] != was[1] or now[0] == now[1]:
        return
    config = deepcopy(program.info.config)
    if not config:
        return
    text = config.get("text_config")
    if isinstance(text, dict) and "tie_word_embeddings" in text:
        text["tie_word_embeddings"] = False
    config["tie_word_embeddings"] = False
    program.info = replace(program.info, config=config)


def _head_and_tokens(program: Program, aliases: Mapping[str, str]) -> tuple[str, str] | None:
    """The tensors that the head and the token embedding it could be tied to have under some aliases; None where there is no head."""
    sites = {s.role: s for s in program.anatomy.sites}
    head = next((sites[r] for r in ("head", "decoder.head", "text.head") if r in sites), None)
    tokens = next((sites[r] for r in ("embed.tokens", "decoder.embed.tokens", "text.embed.tokens") if r in sites), None)
    if head is None or tokens is None or not head.calls or not tokens.calls:
        return None
    names = [weight_names(program, s)[0] for s in (head, tokens)]
    return aliases.get(names[0], names[0]), aliases.get(names[1], names[1])
