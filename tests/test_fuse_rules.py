"""Fusion rules of norms, activations, embeddings and cleanup: where each fires, why it does not, and that nothing changes but the operations."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from surgery.backends.fuse import Target, engine, fuse, ops_activation, ops_embedding, ops_norm  # noqa: F401  (registers the operations)
from surgery.backends.fuse.engine import FusionEntry
from surgery.backends.fuse.gate import difference, run
from surgery.backends.fuse.ops import translations
from surgery.backends.fuse.view import FuseView
from surgery.model.live import Tensors, live_root
from surgery.model.program import Program
from surgery.model.sample import sample_inputs
from surgery.opening import capture
from surgery.passes import registry
from tests import workbench
from tests.captured_programs import zoo_program
from tests.gates import Close

aten, ops = torch.ops.aten, torch.ops.surgery

CLEANUP = ("dead_code", "drop_identities", "simplify_masks", "fold_constants", "common_subexpressions")
MINE = (
    *CLEANUP, "low_rank_order", "low_rank_shared", "written_activation", "rms_norm", "embedding_norm", "skip_layer_norm", "skip_rms_norm",
    "bias_gelu", "quick_gelu", "gated_activation",
)  # fmt: skip


def rooted(program: Program, dtype: torch.dtype = torch.float32) -> fx.GraphModule:
    return live_root(program, Tensors(registry.function), dtype=dtype).eval()


def fused(program: Program, target: Target = Target(), only: tuple[str, ...] = MINE) -> tuple[dict[str, FusionEntry], fx.GraphModule]:
    """Reports and graph; on padded inputs of another size the graph gives what the program's own gives."""
    root = rooted(program)
    result = fuse(program, root, target, only)
    inputs = sample_inputs(program, batch=3, length=17, seed=23, padding=True, past=3)
    gap = max(difference(a, b, None) for a, b in zip(run(root, inputs), run(result.graph, inputs), strict=True))
    assert gap < 1e-5
    assert all(entry.error <= entry.tolerance for entry in result.report)
    return {e.rule: e for e in result.report}, result.graph


# ------------------------------------------------------------------ families

FAMILIES: dict[str, dict[str, int]] = {
    # norms behind their blocks: SkipLayerNorm with biases; embeddings are one operation
    "bert": {"simplify_masks": 6, "embedding_norm": 1, "skip_layer_norm": 6, "bias_gelu": 3, "rms_norm": 0, "quick_gelu": 0},
    # norms in front: the sum is kept; a GELU that is written out; biases inside the products
    "gpt2": {"embedding_norm": 1, "skip_layer_norm": 6, "written_activation": 3, "bias_gelu": 0, "simplify_masks": 2},
    # a mask that hides nothing leaves
    "vit": {"skip_layer_norm": 7, "bias_gelu": 3, "simplify_masks": 3, "embedding_norm": 0},
    "llama": {
        "rms_norm": 7,
        "skip_rms_norm": 6,
        "quick_gelu": 3,
        "gated_activation": 0,
        "common_subexpressions": 7,
        "skip_layer_norm": 0,
    },
}
MISSES: dict[str, dict[str, dict[str, int]]] = {
    "gpt2": {"bias_gelu": {"the product adds its bias itself": 3}},
    "llama": {
        "gated_activation": {"the runtime has no kernel for it on this device": 3},
        "skip_rms_norm": {"the norm reads no sum of two values": 1},
    },
}


@pytest.mark.parametrize("family", FAMILIES)
def test_what_fires_on_a_family(family: str) -> None:
    report, graph = fused(zoo_program(family)[0])
    assert {name: report[name].fired for name in FAMILIES[family]} == FAMILIES[family]
    for name, expected in MISSES.get(family, {}).items():
        assert Counter(m.condition for m in report[name].misses) == expected
    left = Counter(str(n.target) for n in graph.graph.nodes)
    assert not any(left[f"aten.{gone}"] for gone in ("dropout.default", "contiguous.default", "rsqrt.default"))
    assert left["surgery.rms_norm.default"] == report["rms_norm"].fired - report["skip_rms_norm"].fired


# ------------------------------------------------------------------ spellings


class Spellings(nn.Module):
    """Norms and activations in the ways in which models write them, and what looks like them and is none."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.linspace(0.5, 1.5, 16))
        self.thin, self.wide = nn.Linear(16, 2, bias=False), nn.Linear(2, 16)
        self.register_buffer("table", torch.arange(4.0))

    def rms(self, x: Tensor, eps: float = 1e-5) -> Tensor:
        return x * torch.rsqrt((x * x).mean(-1, keepdim=True) + eps)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        wide = x.to(torch.float32)
        found = [
            self.gain * self.rms(x),
            self.rms(x) * (1 + self.gain),
            self.rms(wide).to(x.dtype),
            F.rms_norm(x, (16,), self.gain, 1e-6),
            0.5 * x * (1 + torch.tanh(0.7978845608 * x * (1 + 0.044715 * x * x))),
            x * 0.5 * (1.0 + torch.erf(x / math.sqrt(2.0))),
            x * torch.sigmoid(1.702 * x),
            x / (1 + torch.exp(-x)),  # SiLU without a sigmoid: left alone
            x * torch.tanh(F.softplus(x)),
            x * torch.sigmoid(3.0 * x),  # none of the known ones
            torch.tanh(x),  # alone
            x * torch.rsqrt(x.pow(2).mean(1, keepdim=True) + 1e-5),  # over the wrong axis
            x * torch.rsqrt((x * x).mean(-1, keepdim=True)),  # without eps
            (x + 1.0) * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5),  # another value
            F.layer_norm(x.unsqueeze(1) + x.unsqueeze(1), (16,), self.gain, self.gain),  # four axes
            F.layer_norm(self.wide(self.thin(x)) + self.gain, (16,), self.gain),
            self.table.cos() + (torch.arange(4, device=x.device) + 2).sqrt(),
        ]
        dropped = x * 3.0
        assert dropped is not None  # nobody reads it
        return tuple(found)


@pytest.fixture(scope="module")
def spelled() -> tuple[dict[str, FusionEntry], fx.GraphModule]:
    torch.manual_seed(5)
    return fused(capture(Spellings().eval(), {"x": torch.randn(2, 6, 16)}))


def test_spellings_of_norms(spelled: tuple[dict[str, FusionEntry], fx.GraphModule]) -> None:
    report, graph = spelled
    assert Counter(p.what for p in report["rms_norm"].places) == {"one norm with its gain": 2, "one norm": 2}
    assert Counter(m.condition for m in report["rms_norm"].misses) == {
        "the mean is not over the last axis alone": 1,
        "no number is added to the mean of squares": 1,
        "what is divided is not what was squared": 1,
    }
    assert sum(n.target is ops.rms_norm.default for n in graph.graph.nodes) == 4
    assert Counter(m.condition for m in report["skip_layer_norm"].misses) == {
        "the values have neither two nor three axes": 1,
        "the other summand is spread over more than the batch": 1,
    }


def test_spellings_of_activations(spelled: tuple[dict[str, FusionEntry], fx.GraphModule]) -> None:
    report, _ = spelled
    assert Counter(p.what for p in report["written_activation"].places) == {"GELU by tanh": 1, "GELU": 1, "quick GELU": 1, "Mish": 1}


def test_constants(spelled: tuple[dict[str, FusionEntry], fx.GraphModule]) -> None:
    """The last output depends on nothing; the gain of 1 + w is left to the runtime, under the name of w."""
    report, graph = spelled
    assert [p.what for p in report["fold_constants"].places] == ["a constant of shape [4]"]
    assert [m.detail for m in report["fold_constants"].misses] == ["gain"]
    last = next(n for n in graph.graph.nodes if n.op == "output").args[0][-1]
    assert torch.equal(graph.get_buffer(str(last.target)), torch.arange(4.0).cos() + torch.arange(2.0, 6.0).sqrt())


# ------------------------------------------------------------------ kernels

CASES: tuple[tuple[str, Any, tuple[Any, ...]], ...] = (
    ("layer", ops.skip_layer_norm.default, ("x", "skip", "w", "b", "c", 1e-5)),
    ("layer, batch of one", ops.skip_layer_norm.default, ("x", "one", "w", None, None, 1e-5)),
    ("layer and sum", ops.skip_layer_norm_sum.default, ("x", "skip", "w", "b", "c", 1e-5)),
    ("rms", ops.rms_norm.default, ("x", "w", 1e-6)),
    ("rms without gain", ops.rms_norm.default, ("x", None, 1e-6)),
    ("skip rms", ops.skip_rms_norm.default, ("x", "skip", "w", None, 1e-6)),
    ("skip rms and sum", ops.skip_rms_norm_sum.default, ("x", "skip", "w", "c", 1e-6)),
    ("bias gelu", ops.bias_gelu.default, ("x", "c", "none")),
    ("bias gelu by tanh", ops.bias_gelu.default, ("x", "c", "tanh")),
    ("gelu by tanh", ops.bias_gelu.default, ("x", None, "tanh")),
    ("quick gelu", ops.quick_gelu.default, ("x", 1.702)),
    ("embeddings", ops.embed_layer_norm.default, ("t", "i", "t", None, None, None, "w", "b", 1e-5)),
    ("embeddings and sum", ops.embed_layer_norm_sum.default, ("t", "i", "t", "j", "t", "i", "w", "b", 1e-5)),
)


class Every(nn.Module):
    def forward(self, **given: Tensor) -> tuple[Tensor, ...]:
        out: list[Tensor] = []
        for _, op, args in CASES:
            made = op(*[given[a] if isinstance(a, str) and a in given else a for a in args])
            out += made if isinstance(made, tuple) else [made]
        return tuple(out)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_bodies_are_what_the_runtime_computes(dtype: torch.dtype) -> None:
    """Every operation in onnxruntime against its body in torch, in one graph that the checker accepts."""
    pytest.importorskip("onnxruntime")
    import onnx

    from surgery.backends.onnx_run import session

    shapes: dict[str, tuple[int, ...]] = {
        "x": (2, 5, 16),
        "skip": (2, 5, 16),
        "one": (1, 5, 16),
        "w": (16,),
        "b": (16,),
        "c": (16,),
        "t": (9, 16),
    }
    draw = torch.Generator().manual_seed(2)
    given: dict[str, Tensor] = {n: torch.randn(s, generator=draw).to(dtype) for n, s in shapes.items()}
    given |= {n: torch.randint(0, 9, s, generator=draw) for n, s in {"i": (2, 5), "j": (1, 5)}.items()}
    exported = torch.export.export(Every(), (), given)
    made = torch.onnx.export(
        exported, (), dynamo=True, opset_version=20, custom_translation_table=translations(), verbose=False, optimize=False
    )
    model = made.model_proto
    onnx.checker.check_model(model)
    got = session(model.SerializeToString()).run(None, {n: t.numpy() for n, t in given.items()})
    want = Every()(**given)
    assert len(got) == len(want) == 16
    for ours, theirs in zip(want, got, strict=True):
        assert ours.numpy().dtype == theirs.dtype
        assert difference(ours, torch.from_numpy(theirs), None) < (1e-6 if dtype is torch.float32 else 2e-3)


class Norms(nn.Module):
    """A layer norm and an RMS norm, on numbers so small that eps decides, with an eps of a size that exporters take for zero too."""

    def forward(self, x: Tensor, w: Tensor, b: Tensor) -> tuple[Tensor, ...]:
        norm = torch.ops.surgery.spread_norm
        y, z = x * 0.5, x * 0.25
        return (
            norm(torch.ops.surgery.total(x, y), w, b, 1e-5, True),
            norm(y, w, None, 1e-5, False),
            norm(z, w, b, 1e-12, True),
            norm(x, None, None, 1e-5, True),
        )


def test_norms_are_spelled_so_that_the_runtime_takes_its_fast_kernel(tmp_path: Path) -> None:
    """Its kernels for norms alone; the one with the shortcut never; and the numbers are those of torch with and without the optimizer."""
    pytest.importorskip("onnxruntime")
    import onnx
    import onnxruntime

    draw = torch.Generator().manual_seed(2)
    given = {
        "x": 1e-3 * torch.randn(2, 5, 16, generator=draw) + 2e-3,
        "w": torch.randn(16, generator=draw),
        "b": torch.randn(16, generator=draw),
    }
    table = translations()  # which registers the operations
    exported = torch.export.export(Norms(), (), given)
    made = torch.onnx.export(exported, (), dynamo=True, opset_version=20, custom_translation_table=table, verbose=False, optimize=False)
    from surgery.backends.onnx_export import _simplify

    _simplify(made.model, set())
    data = made.model_proto.SerializeToString()
    want = Norms()(**given)
    for level in (onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL, onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL):
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level, options.log_severity_level = level, 4
        options.optimized_model_filepath = str(tmp_path / "seen.onnx")
        got = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"]).run(
            None, {n: t.numpy() for n, t in given.items()}
        )
        assert max(difference(a, torch.from_numpy(b), None) for a, b in zip(want, got, strict=True)) < 2e-6
    kinds = Counter(n.op_type for n in onnx.load(tmp_path / "seen.onnx").graph.node)
    assert kinds["SimplifiedLayerNormalization"] == 1 and kinds["LayerNormalization"] == 2 and kinds["SkipLayerNormalization"] == 0


# ------------------------------------------------------------------ adapters that stay


def adapted(family: str, roles: list[str]) -> Program:
    program, _ = zoo_program(family)
    workbench.run(program, workbench.operation(program, "adapt", "lora", roles, rank=4))
    program._anatomy = None
    workbench.perturb(program)
    return program


def live_names(program: Program) -> frozenset[str]:
    return frozenset(t for a in program.attachments for t in a.tensors)


class Changed(nn.Module):
    """Weights with low-rank changes in the ways in which adapters write them, and what has to be formed."""

    def __init__(self) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(4)
        shapes = {
            "w": (3, 20, 16), "b": (3, 20, 2), "a": (3, 2, 16), "v": (3, 16, 20), "p": (3, 16, 2), "q": (3, 2, 20), "wide": (20, 16), "left": (20, 2),
            "right": (2, 16), "full": (20, 12), "rows": (12, 16), "bias": (20,), "stored": (20, 2), "fixed": (2, 16),
        }  # fmt: skip
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.randn(shape, generator=draw), requires_grad=False))
        self.register_buffer("keep", torch.rand(20, 16, generator=draw) > 0.5)

    def forward(self, x: Tensor, ends: Tensor) -> tuple[Tensor, ...]:
        change = self.left @ self.right
        return (
            ops.grouped_mm(x, torch.baddbmm(self.w, self.b, self.a, alpha=2.0).transpose(-2, -1), ends),
            ops.grouped_mm(x, torch.baddbmm(self.v, self.p, self.q), ends),
            F.linear(x, self.wide + change * 0.5, self.bias),
            F.linear(x, change, self.bias),
            x @ change.t(),
            F.linear(x, torch.where(self.keep, change, 0.0)),
            F.linear(x, self.full @ self.rows),
            F.linear(x, change.tanh()),
            F.linear(x, self.stored @ self.fixed),  # no adapter's
        )


def test_low_rank_changes_are_never_formed() -> None:
    """Experts in both layouts and matrices; a mask, a rank that is not low and a function of the change have to be formed, and say so."""
    module, draw = Changed(), torch.Generator().manual_seed(9)
    given = [torch.randn(11, 16, generator=draw), torch.tensor([4, 4, 11], dtype=torch.int32)]
    graph = torch.export.export(module, tuple(given)).module(check_guards=False)
    graph.graph.set_codegen(fx.graph.CodeGen())
    for node in graph.graph.find_nodes(op="call_module"):
        graph.graph.erase_node(node)
    flat = fx.GraphModule(graph, graph.graph)
    names = ("w", "b", "a", "v", "p", "q", "left", "right", "full", "rows")
    program = SimpleNamespace(attachments=[SimpleNamespace(tensors=names[1:3] + names[4:])], aliases={})
    view, gate = FuseView(flat, program, Target(live=frozenset(names))), Close(flat, given)  # type: ignore[arg-type]
    entry = engine._run(next(r for r in engine.rules() if r.name == "low_rank_order"), view, gate)  # type: ignore[arg-type]
    assert [p.what for p in entry.places] == ["two products of rank 2"] * 5
    assert Counter(m.condition for m in entry.misses) == {
        "a mask keeps parts of the change zero, so that it has to be formed": 1,
        "the rank is not low: two products are no less work": 1,
        "the change is no product of two factors": 1,
    }
    left = Counter(str(n.target) for n in flat.graph.nodes)
    assert left["aten.baddbmm.default"] == 0 and left["aten.matmul.default"] + left["aten.mm.default"] == 3
    assert set(names) <= {str(n.target) for n in flat.graph.nodes if n.op == "get_attr"}  # factors keep their names


@pytest.mark.parametrize("tied", [True, False])
def test_a_shared_first_factor_is_multiplied_once(tied: bool) -> None:
    program = adapted("bert", ["layers[0].attn.q", "layers[0].attn.k", "layers[0].attn.v"])
    first, *others = [t for a in program.attachments for t in a.tensors if t.endswith(".A")]
    for other in others if tied else ():
        program.aliases[other] = first
        del program.weights[other]
        owner, _, leaf = other.rpartition(".")
        program.graph.get_submodule(owner)._parameters[leaf] = program.graph.get_parameter(first)
    report, graph = fused(program, Target(live=live_names(program)), ("drop_identities", "low_rank_shared"))
    found = report["low_rank_shared"]
    assert (found.fired, len(found.misses)) == ((2, 0) if tied else (0, 2))
    rank = sum(n.target is aten.linear.default and n.meta["val"].shape[-1] == 4 for n in graph.graph.nodes)
    assert rank == (1 if tied else 3)


def test_an_adapter_beside_a_projection_is_a_near_miss_of_packing() -> None:
    """The first condition that fails and where: the adapted projection and the adapter's second factor."""
    program = adapted("bert", ["layers[0].attn.q", "layers[0].attn.v"])
    report, _ = fused(program, Target(live=live_names(program)), ("drop_identities", "pack_qkv"))
    found = report["pack_qkv"]
    assert found.fired == 2, "the layers without adapters"
    (miss,) = found.misses
    assert miss.condition == "an operand comes from more than one product, as with an adapter beside a projection"
    stem = "encoder.layer.0.attention.self.query"
    assert (
        miss.node_name.startswith(stem.removesuffix(".query"))
        and miss.detail.startswith(f"q: {stem}.weight, {stem}.")
        and miss.detail.endswith(".B")
    )
