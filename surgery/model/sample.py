"""Example inputs for a program: seeded, in range, with real padding, for certificates and checks."""

from __future__ import annotations

from typing import Any

import torch

from surgery.core.diagnostics import fail
from surgery.model.program import Program, ValueSpec


def placeholders(program: Program) -> list[tuple[str, ValueSpec]]:
    """Name and spec of every flat input, in order."""
    return [(str(n.target), n.meta["spec"]) for n in program.graph.graph.nodes if n.op == "placeholder"]


def sizes(program: Program, batch: int, length: int, past: int = 0) -> dict[str, int]:
    """A size for every symbol: the first axis of an input is its batch, axes of a cache get ``past``, other axes ``length``.

    A second independent length (a decoder's beside its encoder's) is shorter, so that the two are never mixed up unseen. Axes of
    floating inputs (samples of a sound) are counted from the traced size, below which a model may have nothing to compute.
    """
    inputs = dict(placeholders(program))
    out: dict[str, int] = {}
    shorter = 0
    for symbol, (name, axis, traced) in program.signature.symbols.items():
        if _is_cache(name):
            out[symbol] = batch if axis == 0 else past
        elif axis == 0 and name in inputs:
            out[symbol] = batch
        elif name in inputs and getattr(torch, inputs[name].dtype).is_floating_point:
            out[symbol] = traced + length
        else:
            out[symbol] = max(1, length - shorter)
            shorter += 3
    return out


def _is_cache(name: str) -> bool:
    return name.startswith("past_key_values") or "past_key" in name or "past_value" in name


def sample_inputs(
    program: Program,
    *,
    batch: int = 2,
    length: int = 16,
    seed: int = 0,
    padding: bool = True,
    dtype: torch.dtype = torch.float32,
    cut: bool = True,
    past: int = 0,
) -> list[torch.Tensor]:
    """One tensor per flat input.

    Token ids are uniform below the vocabulary, masks are ones with a ragged right padding when ``padding``, positions count
    up, floating inputs are standard normal, caches hold ``past`` standard normal steps. With ``cut``, ``length`` is cut to what
    the model's position table holds.
    """
    generator = torch.Generator().manual_seed(seed)
    length = min(length, _longest(program) - past) if cut else length
    at = sizes(program, batch, length, past)
    past = _past_length(program, at)
    out = []
    for name, spec in placeholders(program):
        shape = tuple(_at(n, at) for n in spec.shape)
        out.append(_one(program, name, spec, shape, generator, padding, dtype, past))
    return out


def _past_length(program: Program, at: dict[str, int]) -> int:
    for symbol, (name, axis, _) in program.signature.symbols.items():
        if _is_cache(name) and axis != 0:
            return at[symbol]
    return 0


def _at(n: Any, at: dict[str, int]) -> int:
    if hasattr(n, "free_symbols"):
        n = n.subs({s: at[str(s)] for s in n.free_symbols})
    return int(n)


def _longest(program: Program) -> int:
    config = program.info.config
    text = config.get("text_config") if isinstance(config.get("text_config"), dict) else config
    assert isinstance(text, dict)
    limits = [text.get(k) for k in ("max_position_embeddings", "n_positions", "max_target_positions")]
    known = [int(n) for n in limits if isinstance(n, int) and n > 0]
    # two positions of slack: RoBERTa-like tables start after the padding index
    return max(1, min(known) - 2) if known else 1 << 20


def _one(
    program: Program,
    name: str,
    spec: ValueSpec,
    shape: tuple[int, ...],
    generator: torch.Generator,
    padding: bool,
    dtype: torch.dtype,
    past: int,
) -> torch.Tensor:
    kind = getattr(torch, spec.dtype)
    if kind.is_floating_point:
        return torch.randn(shape, generator=generator).to(dtype if spec.dtype == "bfloat16" else kind)
    if kind is torch.bool or "mask" in name:
        mask = torch.ones(shape, dtype=kind)
        if padding and len(shape) == 2 and shape[1] > 2:
            for row in range(1, shape[0]):
                mask[row, shape[1] - 1 - row % (shape[1] // 2) :] = 0
        return mask
    if "position" in name and len(shape) >= 1:
        return (torch.arange(shape[-1]) + past).expand(shape).clone().to(kind)
    high = vocabulary(program, name)
    if high is None:
        raise fail("S0508", f"cannot make example values for the input `{name}`", help="give example inputs from Python with `inputs=`")
    low = 3 if high > 16 else 0  # keep clear of padding and other special ids, which some models treat apart
    return torch.randint(low, high, shape, generator=generator, dtype=kind)


def vocabulary(program: Program, name: str) -> int | None:
    """Number of rows of the embedding that the input indexes, found by following the graph to the first embedding."""
    if "token_type" in name:
        size = program.info.config.get("type_vocab_size")
        if isinstance(size, int):
            return max(1, size)
    from surgery.model.flat import flatten

    flat = flatten(program.graph)
    graph = getattr(flat, "graph", flat)
    start = next((n for n in graph.nodes if n.op == "placeholder" and str(n.target) == name), None)
    seen, queue = set(), [start] if start is not None else []
    sizes: list[int] = []
    while queue:
        node = queue.pop(0)
        if node in seen:
            continue
        seen.add(node)
        for user in node.users:
            if "embedding" in str(user.target) and len(user.args) > 1 and user.args[1] is node:
                table = user.args[0].meta["spec"].shape
                sizes.append(int(table[0]))
            elif isinstance(user.meta.get("spec"), ValueSpec) and user.meta["spec"].kind == "tensor":
                if user.meta["spec"].dtype == node.meta["spec"].dtype:
                    queue.append(user)
    if sizes:
        return min(sizes)
    value = program.info.config.get("vocab_size")
    return value if isinstance(value, int) else None
