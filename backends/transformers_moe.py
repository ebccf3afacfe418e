"""Dense models whose feed-forward blocks were converted to experts, described as the Mixtral family describes them."""

from __future__ import annotations

import re
from typing import Any

from surgery.core.site import Site
from surgery.model.program import Program

LIKE_MIXTRAL = {"llama": "Llama", "mistral": "Mistral"}
"""Families whose layers differ from Mixtral's in the feed-forward block only, and the word in their class names."""


def as_mixtral(program: Program, config: Any) -> tuple[Any, str, dict[str, str]] | None:
    """``(config, architecture, name in the checkpoint of each renamed tensor)`` where every layer has experts in Mixtral's form: gated,
    gate rows before up rows in one tensor, a router without bias; None otherwise."""
    word = LIKE_MIXTRAL.get(program.info.family)
    target = program.info.architecture.replace(word, "Mixtral") if word else ""
    if not word or len(program.anatomy.stacks) != 1:
        return None
    stack = program.anatomy.stacks[0]
    sites = {s.role: s for s in program.anatomy.sites}
    names: dict[str, str] = {}
    counts: set[Any] = set()
    for i in range(stack.layers):
        layer = f"{stack.name}[{i}]"
        block = sites.get(f"{layer}.ffn.experts")
        parts = [sites.get(f"{layer}.ffn.{p}") for p in ("router", "experts.gate", "experts.up", "experts.down")]
        if block is None or any(p is None for p in parts):
            return None
        router, gate, up, down = [p for p in parts if p is not None]
        if router.bias or gate.weight != up.weight or gate.rows[:1] != ((0, gate.shape[1]),) or block.facts.get("activation") != "silu":
            return None
        counts.add((block.facts.get("experts"), block.facts.get("top_k")))
        at = f"{stack.path}.{i}.mlp"
        names |= {router.weight: f"{at}.gate.weight", up.weight: f"{at}.experts.gate_up_proj", down.weight: f"{at}.experts.down_proj"}
    import transformers

    if len(counts) != 1 or not hasattr(transformers, target):  # asking for a class imports the family: last
        return None
    return _config(config, sites, stack.name, *counts.pop()), target, names


def _config(config: Any, sites: dict[str, Site], stack: str, experts: int, top_k: int) -> Any:
    from transformers import AutoConfig

    plain = {k: v for k, v in config.to_dict().items() if k not in ("model_type", "architectures", "transformers_version")}
    known = set(AutoConfig.for_model("mixtral").to_dict())
    plain = {k: v for k, v in plain.items() if k in known and not re.match(r"_", k)}
    plain["sliding_window"] = plain.get("sliding_window")
    return AutoConfig.for_model("mixtral", **{**plain, "num_local_experts": experts, "num_experts_per_tok": top_k})
