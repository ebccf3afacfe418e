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

    A cache captured from live tensors may have a fixed number of steps, which then stands for ``past``. A mask that was traced over the
    cache and the new steps gets both. A second independent length (a decoder's beside its encoder's) is shorter, so that the two are
    never mixed up unseen. Axes of floating inputs (samples of a sound) are counted from the traced size, below which a model may have
    nothing to compute.
    """
    inputs = dict(placeholders(program))
    out: dict[str, int] = {}
    shorter = 0
    traced_past, fixed = _traced_past(program)
    past = traced_past if fixed else past
    own = {s: t for s, (n, a, t) in program.signature.symbols.items() if a != 0 and not _is_cache(n) and "mask" not in n}
    both = {
        s: next(o for o, t in own.items() if traced == t + traced_past)
        for s, (name, _, traced) in program.signature.symbols.items()
        if traced_past and "mask" in name and traced - traced_past in own.values()
    }
    for symbol, (name, axis, traced) in program.signature.symbols.items():
        if _is_cache(name):
            out[symbol] = batch if axis == 0 else past
        elif axis == 0 and name in inputs:
            out[symbol] = batch
        elif name in inputs and getattr(torch, inputs[name].dtype).is_floating_point:
            out[symbol] = traced + length
        elif symbol not in both:
            out[symbol] = max(1, length - shorter)
            shorter += 3
    return out | {symbol: out[new] + past for symbol, new in both.items()}


def _traced_past(program: Program) -> tuple[int, bool]:
    """The steps of the cache when the model was traced (0 without one), and whether the graph is fixed to them."""
    for name, axis, traced in program.signature.symbols.values():
        if _is_cache(name) and axis != 0:
            return traced, False
    for name, spec in placeholders(program):
        if _is_cache(name) and len(spec.shape) == 4 and not getattr(spec.shape[2], "free_symbols", None):
            return int(spec.shape[2]), True
    return 0, False


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
    steps, fixed = _traced_past(program)
    length = min(length, _longest(program) - (steps if fixed else past)) if cut else length
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
    return _traced_past(program)[0]


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
