"""Layers that are copies of one another are analysed once: what is stamped for the others must be what a walk over all nodes finds."""

from __future__ import annotations

import importlib
from functools import cache
from typing import Any

import pytest
from torch import fx

from surgery.driver import load_spec
from surgery.model import twins
from surgery.model.anatomy import find_anatomy
from surgery.model.capture import capture_config
from surgery.model.dims import Dims
from surgery.model.dims.algebra import find
from surgery.model.flat import flatten
from surgery.model.program import Program
from surgery.model.twins import Copies, Run
from surgery.passes.resolve import resolve
from surgery.session import apply
from tests.anatomy_support import program_of
from tests.carrying import differences
from tests.zoo import ZOO

analysis = importlib.import_module("surgery.model.dims.analyse")

_TEXT = dict(
    vocab_size=99,
    hidden_size=32,
    num_attention_heads=4,
    num_key_value_heads=1,
    head_dim=8,
    intermediate_size=64,
    max_position_embeddings=64,
)
_MAMBA = dict(use_mamba_kernels=False, mamba_d_state=4, mamba_dt_rank=4)

# the model, and how many of its layers are stamped in the classes and in the roles
FAMILIES: dict[str, tuple[str, dict[str, Any], int, int]] = {
    "llama": ("LlamaForCausalLM", dict(num_hidden_layers=8), 6, 3),
    "mixtral": ("MixtralForCausalLM", dict(num_hidden_layers=6), 4, 1),
    "t5": ("T5Model", dict(num_layers=6, num_decoder_layers=6), 8, 0),  # only the first layers have tables of positions
    "gemma2": ("Gemma2ForCausalLM", dict(_TEXT, num_hidden_layers=8, sliding_window=8), 4, 1),  # two kinds of windows, one key head
    "jamba": ("JambaForCausalLM", dict(_TEXT, num_hidden_layers=16, num_experts=4, num_experts_per_tok=2, **_MAMBA), 8, 1),
    "swin": ("SwinModel", dict(depths=[2, 6]), 0, 0),  # windows are put together anew in every layer
    "resnet": ("ResNetModel", dict(depths=[3, 6]), 3, 1),
}


@pytest.fixture(autouse=True)
def few_are_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small models are stamped, too."""
    monkeypatch.setattr(twins, "LEAST", 3)


@cache
def captured(family: str) -> Program:
    from transformers import AutoConfig

    architecture, more, *_ = FAMILIES[family]
    config = AutoConfig.for_model(family, **(dict(ZOO[family].config) if family in ZOO else {}) | more)
    return program_of(capture_config(config, architecture), family, config.to_dict())


def walked(graph: fx.Graph, aliases: dict[str, str]) -> Dims:
    """The analysis without twins: every node is walked."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(analysis, "runs", lambda graph: [Run(list(graph.nodes))])
        return analysis.analyse(graph, aliases=aliases)


def classes(dims: Dims) -> dict[str, Any]:
    """All that an analysis knows, with the numbers of the axes in their place."""
    cx = dims._cx
    states: dict[int, Any] = {}

    def number(axis: Any) -> tuple[int, int]:
        stack = [find(axis)]
        while stack:
            root = stack.pop()
            if root.uid not in states:
                parts = [find(p) for p in root.parts]
                states[root.uid] = root.kind, root.size, [p.uid for p in parts], set(root.flags), str(root.frozen)
                stack += parts
        return axis.uid, find(axis).uid

    def all_of(value: Any) -> Any:
        return value if value is None else [all_of(v) if isinstance(v, tuple) else number(v) for v in value]

    return {
        "values": {n: all_of(v) for n, v in cx.values.items()},
        "parameters": [(n, all_of(v), [dims.text(a, unique=True) for a in v]) for n, v in dims.parameters.items()],
        "constants": [(c.node, c.path, c.kind, [number(a)[1] for a in c.axes], c.data) for c in cx.constants],
        "cuts": {n: (number(c.axis)[1], c.start, c.stop, c.step) for n, c in cx.cuts.items()},
        "domains": {n: number(a)[1] for n, a in cx.domains.items()},
        "items": {n: number(a)[1] for n, a in cx.item_domains.items()},
        "limits": [(number(a)[1], least, n) for a, least, n in cx.limits],
        "inner": [number(a)[1] for a in cx.inner],
        "conflicts": [(n, number(a)[1], number(b)[1]) for n, a, b in cx.algebra.conflicts],
        "rest": (cx.specs, cx.integers, cx.windows, dims.unknown, cx.algebra.count),
        "leaves": [(leaf.name, leaf.letter, leaf.size, leaf.flags, leaf.reason) for leaf in dims.all_leaves(stored=False)],
        "groups": [str(dims.remove({leaf: [0]})) for leaf in dims.all_leaves() if leaf.free and leaf.size > 1],
        "states": states,
    }


def same(program: Program) -> tuple[int, int]:
    """Asserts that stamping finds what a walk over everything finds; how many layers were stamped in the classes, and in the roles."""
    graph = flatten(program.graph, program.aliases, bare=True)
    stamped, plain = analysis.analyse(graph, aliases=program.aliases), walked(graph, program.aliases)
    left, right = classes(stamped), classes(plain)
    for what in left:
        assert left[what] == right[what], what
    found = []
    for dims in (stamped, plain):
        program = program.copy()
        program._dims, program._anatomy, program._carry = dims, None, None
        found.append(find_anatomy(program))
    assert not differences(*found)
    copies = sum(run.kind is not None and run.kind is not run for run in stamped.runs)
    return copies, len(Copies(stamped.runs).of)


@pytest.mark.parametrize("family", FAMILIES)
def test_stamped_layers_are_as_walked_ones(family: str) -> None:
    assert same(captured(family)) == FAMILIES[family][2:]


@pytest.mark.parametrize(
    "spec, stamped",
    [
        ("prune layers(count = 1, score = random) on layers keep layers[0, -1]", (5, 2)),
        ("prune ffn(ratio = 25%) on layers[4].ffn", (5, 0)),  # one layer has other sizes
        ("prune ffn(ratio = ramp(20%, 50%)) on layers[*].ffn", (0, 0)),
        ("prune width(ratio = 25%)", (6, 3)),
        ("share layers(groups = [[5, 6]]) on layers[5..6]", (5, 1)),
        ("adapt lora(rank = 2) on layers[2].attn.{q, v}\nprune ffn(ratio = 25%) on layers[*].ffn", (6, 3)),
        ("insert bottleneck(width = 4) beside layers[*].ffn", (6, 3)),
    ],
)
def test_a_changed_model_is_as_walked_too(spec: str, stamped: tuple[int, int]) -> None:
    program = captured("llama").copy()
    for statement in load_spec(f"surg 1\n\n{spec}\n").statements:
        apply(program, resolve(program, statement))
    assert same(program) == stamped
