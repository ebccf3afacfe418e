"""``emit onnx`` with its parameters: precisions, caches, live adapters, encoder and decoder, operator sets, and what goes wrong."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import surgery
from tests.driver_support import debris
from tests.zoo import ZOO

onnx = pytest.importorskip("onnx")
runtime = pytest.importorskip("onnxruntime")

FEW: dict[str, dict[str, int]] = {
    "bert": {"num_hidden_layers": 2}, "llama": {"num_hidden_layers": 1}, "bart": {"encoder_layers": 1, "decoder_layers": 1},
}  # fmt: skip

IDS = torch.randint(3, 90, (2, 9), generator=torch.Generator().manual_seed(1))
MASK = torch.ones_like(IDS)
MASK[1, 6:] = 0


def run(path: str | Path, feeds: dict[str, Any], options: Any = None, active: Any = None) -> dict[str, Any]:
    """The outputs of a graph by name, given what it takes of ``feeds``."""
    options = options or runtime.SessionOptions()
    options.log_severity_level = 4
    session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    known = {i.name for i in (*session.get_inputs(), *session.get_overridable_initializers())}
    chosen = runtime.RunOptions()
    if active is not None:
        chosen.add_active_adapter(active)
    given = {k: v for k, v in feeds.items() if k in known}
    return dict(zip([o.name for o in session.get_outputs()], session.run(None, given, chosen), strict=True))


def feeds(**tensors: torch.Tensor) -> dict[str, Any]:
    return {k: v.numpy() for k, v in tensors.items()}


def shapes(values: Any) -> dict[str, list[Any]]:
    return {v.name: [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim] for v in values}


def metadata(path: str | Path, key: str) -> Any:
    return next(json.loads(p.value) for p in onnx.load(str(path)).metadata_props if p.key == key)


def trained(folder: str, seed: int) -> nn.Module:
    """An artifact whose adapters do something, saved in its place."""
    module = surgery.load(folder)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    surgery.save(module, folder, force=True)
    return module.eval()


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with a tiny encoder, a decoder and an encoder-decoder whose values are large enough to tell graphs apart."""
    home = tmp_path_factory.mktemp("onnx")
    for family in ("bert", "llama", "bart"):
        torch.manual_seed(0)
        model = ZOO[family].make_model(**FEW[family])
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(4.0) if p.ndim > 1 else p.add_(0.1 * torch.randn_like(p))
        model.save_pretrained(home / family)  # type: ignore[operator]
    old = Path.cwd()
    os.chdir(home)
    yield home
    os.chdir(old)


LORA = "surg 1\n\nadapt lora(rank = {}, alpha = {}) on layers[*].attn.{{q, v}} as news\n"


@pytest.fixture(scope="module")
def adapters(work: Path) -> tuple[nn.Module, nn.Module, surgery.Result]:
    """Two trained adapters on one encoder, of rank 4 and 3 and one scale, and a graph that keeps the first live."""
    for name, rank in (("first", 4), ("second", 3)):
        surgery.compile(LORA.format(rank, 2 * rank) + f'emit torch to "{name}"\n', "bert")
    modules = trained("first", 1), trained("second", 2)
    spec = 'surg 1\n\nadapt lora(rank = 2) on layers[0].ffn.up as more\nemit onnx(live = [@news]) to "live.onnx"\n'
    return *modules, surgery.compile(spec, "first")


# ------------------------------------------------------------------ live adapters


def test_two_adapters_run_on_one_graph(adapters: tuple[nn.Module, nn.Module, surgery.Result]) -> None:
    """The graph that one adapter was emitted with gives what torch gives with the other, of another rank, and is itself again without it."""
    first, second, result = adapters
    given = feeds(input_ids=IDS, attention_mask=MASK, token_type_ids=torch.zeros_like(IDS))
    with torch.no_grad():
        want = [m(input_ids=IDS, attention_mask=MASK).last_hidden_state.numpy() for m in (first, second)]
    assert np.abs(want[0] - want[1]).max() > 0.1
    other = surgery.adapter_inputs("live.onnx", "second")
    assert len(other) == 8 and {v.shape[0] for k, v in other.items() if k.endswith(".A")} == {3}
    assert np.abs(run("live.onnx", given)["last_hidden_state"] - want[0]).max() <= 1e-4
    assert np.abs(run("live.onnx", given | other)["last_hidden_state"] - want[1]).max() <= 1e-4
    own = surgery.adapter_inputs("live.onnx", "first")
    assert np.array_equal(run("live.onnx", given | own)["last_hidden_state"], run("live.onnx", given)["last_hidden_state"])
    swapped = [c for c in result.certificates if c["claim"] == "torch = onnx with another adapter"]
    assert [c["ok"] and c["moved"] > 0 for c in swapped] == [True, True] and swapped[1]["adapter"].startswith("one larger")


def test_a_session_takes_another_adapter_as_initializers_and_as_a_file(adapters: tuple[nn.Module, nn.Module, surgery.Result]) -> None:
    """The two other ways of onnxruntime: values given once for a session, and an adapter file chosen for each run."""
    given = feeds(input_ids=IDS, attention_mask=MASK, token_type_ids=torch.zeros_like(IDS))
    values = {n: runtime.OrtValue.ortvalue_from_numpy(v) for n, v in surgery.adapter_inputs("live.onnx", "second").items()}
    want = run("live.onnx", given | surgery.adapter_inputs("live.onnx", "second"))["last_hidden_state"]
    file = runtime.AdapterFormat()
    file.set_adapter_version(1)
    file.set_model_version(1)
    file.set_parameters(values)
    file.export_adapter("second.onnx_adapter")
    adapter = runtime.LoraAdapter()
    adapter.Load("second.onnx_adapter")
    assert np.array_equal(run("live.onnx", given, active=adapter)["last_hidden_state"], want)
    options = runtime.SessionOptions()
    for name, value in values.items():
        options.add_initializer(name, value)
    assert np.abs(run("live.onnx", given, options)["last_hidden_state"] - want).max() <= 1e-5


def test_what_is_not_named_is_folded_and_what_is_has_its_place(adapters: tuple[nn.Module, nn.Module, surgery.Result]) -> None:
    graph = onnx.load("live.onnx").graph
    held = {i.name for i in graph.initializer}
    live = {n: s for n, s in shapes(graph.input).items() if n in held}
    assert len(live) == 8 and all(".news." in n for n in live) and not any(".more." in n for n in held)
    ranks = [s for shape in live.values() for s in shape if isinstance(s, str)]
    assert len(set(ranks)) == 4 and all(r.startswith("rank") for r in ranks), "each pair of factors has one open rank"
    entry = metadata("live.onnx", "surgery.adapters")
    assert {e["name"] for e in entry} == {"news"} and {e["scale"] for e in entry} == {2.0}
    assert sorted(n for e in entry for n in e["tensors"]) == sorted(live)
    plan = surgery.plan(LORA.format(4, 8) + 'emit onnx(live = true) to "x.onnx"\n', "bert")
    assert any("4 adapters live" in fact for fact in plan.steps[-1].facts)


def test_an_adapter_of_another_scale_does_not_fit(adapters: tuple[nn.Module, nn.Module, surgery.Result]) -> None:
    surgery.compile(LORA.format(4, 4) + 'emit torch to "third"\n', "bert")
    with pytest.raises(surgery.SurgeryError) as caught:
        surgery.adapter_inputs("live.onnx", "third")
    assert caught.value.diagnostics[0].code == "S0879" and "the scale of news" in caught.value.diagnostics[0].message


# ------------------------------------------------------------------ encoder and decoder


@pytest.fixture(scope="module")
def pair(work: Path) -> surgery.Result:
    spec = 'surg 1\n\nadapt lora(rank = 2) on decoder.layers[*].attn.q\nemit torch to "whole"\nemit onnx(optimize = none, cache = false) to "pair.onnx"\n'
    return surgery.compile(spec, "bart")


def test_encoder_then_decoder_is_the_model(pair: surgery.Result) -> None:
    assert [p.name for p in pair.artifacts if p.suffix == ".onnx"] == ["pair.encoder.onnx", "pair.decoder.onnx"] and not Path(
        "pair.onnx"
    ).exists()
    target = torch.randint(3, 90, (2, 5), generator=torch.Generator().manual_seed(2))
    given = dict(input_ids=IDS, attention_mask=MASK, decoder_input_ids=target, decoder_attention_mask=torch.ones_like(target))
    with torch.no_grad():
        want = surgery.load("whole").eval()(**given)
    states = run("pair.encoder.onnx", feeds(**given))["last_hidden_state"]
    got = run("pair.decoder.onnx", feeds(**given) | {"encoder_hidden_states": states, "encoder_attention_mask": MASK.numpy()})
    assert np.abs(states - want.encoder_last_hidden_state.numpy()).max() <= 1e-4
    assert list(got) == ["last_hidden_state"] and np.abs(got["last_hidden_state"] - want.last_hidden_state.numpy()).max() <= 1e-4
    longer = run(
        "pair.decoder.onnx",
        feeds(**given) | {"encoder_hidden_states": states[::-1].copy(), "encoder_attention_mask": MASK.numpy()[::-1].copy()},
    )
    assert np.abs(longer["last_hidden_state"] - got["last_hidden_state"]).max() > 0.01, "the decoder reads what it is given"
    claims = {c["claim"] for c in pair.certificates}
    assert "whole model = encoder, then decoder" in claims and all(c["ok"] for c in pair.certificates)
    assert {c.get("graph") for c in pair.certificates if c["claim"] == "torch = onnx"} == {"encoder", "decoder"}


def test_the_plan_and_the_notes_say_that_there_are_two_graphs_and_no_cache(pair: surgery.Result) -> None:
    assert any("two graphs" in f and "without a cache" in f for f in pair.plan.steps[-1].facts)
    notes = "\n".join(pair.notes)
    assert 'onnxruntime.InferenceSession("pair.encoder.onnx")' in notes and '"encoder_hidden_states": ...' in notes
    decoder = shapes(onnx.load("pair.decoder.onnx").graph.input)
    assert decoder["encoder_hidden_states"] == ["batch", "encoder_sequence", 32] and decoder["decoder_input_ids"] == [
        "batch",
        "decoder_sequence",
    ]


def test_both_files_are_replaced_together_or_not_at_all(pair: surgery.Result, tmp_path: Path) -> None:
    spec = 'surg 1\n\nfreeze all on decoder.layers\nemit onnx(optimize = none) to "pair.onnx"\n'
    (tmp_path / "pair.decoder.onnx").write_bytes(b"somebody's")
    with pytest.raises(surgery.SurgeryError) as caught:
        surgery.compile(spec, "bart", out=tmp_path)
    assert caught.value.diagnostics[0].code == "S0803" and "pair.decoder.onnx" in caught.value.diagnostics[0].message
    assert [p.name for p in tmp_path.iterdir()] == ["pair.decoder.onnx"] and not debris(tmp_path)


# ------------------------------------------------------------------ caches


def test_a_decoder_with_its_cache_and_without(work: Path) -> None:
    """Two steps with the cache give what one whole sequence gives without it, and what torch gives."""
    spec = 'surg 1\n\nfreeze all on layers\nemit torch to "llm"\nemit onnx(cache = true) to "step.onnx"\nemit onnx(cache = false, optimize = none) to "whole.onnx"\n'
    result = surgery.compile(spec, "llama")
    whole = run("whole.onnx", feeds(input_ids=IDS, attention_mask=MASK))
    assert list(whole) == ["logits"]
    with torch.no_grad():
        want = surgery.load("llm").eval()(input_ids=IDS, attention_mask=MASK).logits.numpy()
    live = MASK.bool().numpy()
    assert np.abs(whole["logits"] - want)[live].max() <= 1e-4
    width = shapes(onnx.load("step.onnx").graph.input)["past_key_values.0.key"]
    assert width[0::2] == ["batch", "past"]
    ids, mask = IDS[:1], torch.ones_like(IDS[:1])
    past = {f"past_key_values.{i}.{what}": np.zeros((1, width[1], 0, width[3]), np.float32) for i in range(1) for what in ("key", "value")}
    logits = []
    for a, b in ((0, 6), (6, 9)):
        out = run("step.onnx", feeds(input_ids=ids[:, a:b], attention_mask=mask[:, :b]) | past)
        logits.append(out["logits"])
        past = {f"past_key_values.{i}.{what}": out[f"present.{i}.{what}"] for i in range(1) for what in ("key", "value")}
    alone = run("whole.onnx", feeds(input_ids=ids, attention_mask=mask))["logits"]
    assert np.abs(np.concatenate(logits, 1) - alone).max() <= 1e-4
    assert any(c["claim"] == "without cache = with an empty one" and c["ok"] for c in result.certificates)


# ------------------------------------------------------------------ precisions


@pytest.fixture(scope="module")
def rounded(work: Path) -> surgery.Result:
    lines = [f'emit onnx(precision = {p}, target = cuda, optimize = none) to "{p}.onnx"\n' for p in ("int8", "fp16")]
    return surgery.compile(LORA.format(2, 4) + 'emit torch to "exact"\n' + "".join(lines), "bert")


def test_int8_products_and_nothing_else(rounded: surgery.Result) -> None:
    graph = onnx.load("int8.onnx").graph
    kinds = {i.name: i.data_type for i in graph.initializer}
    weights = sorted(n.removesuffix("_quantized") for n in kinds if n.endswith("_quantized"))
    assert weights and all(kinds[f"{n}_quantized"] == 3 and kinds[f"{n}_scale"] == 1 for n in weights), "int8 with fp32 scales"
    up = next(i for i in graph.initializer if i.name == "encoder.layer.1.intermediate.dense.weight_scale")
    assert list(up.dims) == [64], "one scale for each column"
    assert kinds["embeddings.word_embeddings.weight"] == 1 and kinds["encoder.layer.0.output.LayerNorm.weight"] == 1
    assert {"MatMulInteger", "DynamicQuantizeLinear"} <= {n.op_type for n in graph.node}
    entry = [c for c in rounded.certificates if c["claim"] == "torch fp32 = onnx int8"]
    assert entry and all(c["ok"] and c["cosine"] > 0.98 for c in entry) and max(c["max_abs_error"] for c in entry) > 1e-5
    assert {(c["for"], c["measured_on"]) for c in entry if "for" in c} == {("cuda", "cpu")}
    given = feeds(input_ids=IDS, attention_mask=MASK, token_type_ids=torch.zeros_like(IDS))
    with torch.no_grad():
        want = surgery.load("exact").eval()(input_ids=IDS, attention_mask=MASK).last_hidden_state.numpy()
    got = run("int8.onnx", given)["last_hidden_state"]
    assert 1e-5 < np.abs(got - want).max() <= 0.2 * np.abs(want).max()
    assert any("weights by column" in n for n in rounded.notes)


def test_int8_is_the_same_every_time_and_takes_experts_one_by_one(work: Path) -> None:
    """Products with a slice of a constant, as experts are stored, are rounded slice by slice; a product of two inputs stays."""
    from surgery.backends import onnx_int8

    weight = np.random.default_rng(0).standard_normal((2, 6, 4)).astype(np.float32)
    nodes = []
    for e in range(2):
        nodes += [
            onnx.helper.make_node("Slice", ["w", f"at{e}", f"at{e + 1}", "axis"], [f"cut{e}"]),
            onnx.helper.make_node("Squeeze", [f"cut{e}", "axis"], [f"own{e}"]),
            onnx.helper.make_node("MatMul", ["x", f"own{e}"], [f"y{e}"]),
        ]
    nodes += [onnx.helper.make_node("Transpose", ["y1"], ["t"], perm=[1, 0]), onnx.helper.make_node("MatMul", ["y0", "t"], ["y"])]
    constants = {"w": weight, "axis": np.array([0]), **{f"at{i}": np.array([i]) for i in range(3)}}
    x, y = (onnx.helper.make_tensor_value_info(n, 1, s) for n, s in (("x", ["n", 6]), ("y", ["n", "n"])))
    held = [onnx.numpy_helper.from_array(v, n) for n, v in constants.items()]
    graph = onnx.helper.make_graph(nodes, "g", [x], [y], held)
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=10)
    one, two = onnx_int8.quantize(model), onnx_int8.quantize(model)
    assert one.model.SerializeToString(deterministic=True) == two.model.SerializeToString(deterministic=True)
    assert one.weights == ("w.part", "w.part_2") and one.kept == (("y", "both sides are computed"),)
    tensors = {i.name: onnx.numpy_helper.to_array(i) for i in one.model.graph.initializer}
    for e, name in enumerate(one.weights):
        back = tensors[f"{name}_quantized"].astype(np.float32) * tensors[f"{name}_scale"]
        assert np.abs(back - weight[e]).max() <= tensors[f"{name}_scale"].max()
    Path("parts.onnx").write_bytes(one.model.SerializeToString())
    given = np.random.default_rng(1).standard_normal((3, 6)).astype(np.float32)
    want = (given @ weight[0]) @ (given @ weight[1]).T
    assert np.abs(run("parts.onnx", {"x": given})["y"] - want).max() <= 0.05 * np.abs(want).max()


def test_fp16_is_measured_against_float32_too(rounded: surgery.Result) -> None:
    entry = [c for c in metadata("fp16.onnx", "surgery.certificate") if c["claim"] == "torch fp32 = onnx fp16"]
    assert {c["case"] for c in entry} == {"random", "padded", "single"} and all(c["cosine"] > 0.999 for c in entry)


class Steep(nn.Module):
    """Finite weights whose product leaves the range of half precision in the middle of the graph."""

    def __init__(self, size: float) -> None:
        super().__init__()
        self.first, self.steep, self.last = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        nn.init.constant_(self.steep.weight, size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(torch.relu(self.steep(torch.relu(self.first(x)) + 1.0)))


@pytest.mark.parametrize(("size", "named"), [(3e4, "with `steep.weight`"), (1e5, "`steep.weight` overflows")])
def test_an_overflow_names_the_place(tmp_path: Path, size: float, named: str) -> None:
    with pytest.raises(surgery.SurgeryError) as caught:
        surgery.compile(
            'surg 1\nfreeze all on "last"\nemit onnx(precision = fp16) to "h.onnx"\n',
            Steep(size),
            inputs=(torch.randn(2, 8),),
            out=tmp_path,
        )
    (found,) = caught.value.diagnostics
    assert found.code == "S0874" and named in " ".join([found.message, *found.notes])
    assert not list(tmp_path.iterdir())


class Masked(nn.Module):
    """Gives infinities on purpose, as scores of what is no choice are."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.where(x > 0, x, -torch.inf)


def test_values_that_are_no_numbers_are_found_in_torch() -> None:
    """Packages are measured against torch in their own precision, where both sides would agree on them."""
    from surgery.backends.torch_finite import refuse_lost

    x = torch.full((2, 8), 0.5)
    steep = Steep(3e4).half()
    nn.init.constant_(steep.last.weight, 1.0)
    broken = Steep(1.0)
    with torch.no_grad():
        broken.steep.weight[0, 0] = torch.nan
    for model, given, code, named in (
        (steep, x.half(), "S0874", "with `steep.bias`"), (Steep(1e5).half(), x.half(), "S0874", "64 of `steep.weight`"), (broken, x, "S0888", "`steep.weight`"),
    ):  # fmt: skip
        with torch.no_grad(), pytest.raises(surgery.SurgeryError) as caught:
            refuse_lost(model, [given], [model(given)], "random")
        (found,) = caught.value.diagnostics
        assert found.code == code and named in " ".join([found.message, *found.notes])
    given = torch.tensor([[-1.0, 2.0]])
    refuse_lost(Masked(), [given], [Masked()(given)], "random")


# ------------------------------------------------------------------ operator sets, shared names


def test_a_graph_of_an_older_operator_set(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
    x = torch.randn(2, 4)
    surgery.compile('surg 1\nfreeze all on "0"\nemit onnx(opset = 17) to "old.onnx"\n', module, inputs=(x,), out=tmp_path)
    model = onnx.load(str(tmp_path / "old.onnx"))
    onnx.checker.check_model(model)
    assert [o.version for o in model.opset_import if o.domain == ""] == [17]
    (got,) = run(tmp_path / "old.onnx", {i.name: x.numpy() for i in model.graph.input}).values()
    assert np.abs(got - module(x).detach().numpy()).max() <= 1e-5


def test_a_shared_weight_has_its_first_name(work: Path) -> None:
    surgery.compile('surg 1\n\nshare layers(groups = all) on layers keep own norm\n\nemit onnx(optimize = none) to "shared.onnx"\n', "bert")
    names = {i.name for i in onnx.load("shared.onnx").graph.initializer}
    assert "encoder.layer.0.intermediate.dense.weight" in names
    assert not any("encoder.layer.1.intermediate" in n for n in names)


def test_metadata_that_is_added_later_stands_behind_the_packed_bytes() -> None:
    """The bytes that were checked and run are those of the file; what they do not hold is written behind them, and what was changed is not hidden."""
    import onnx

    from surgery.backends.onnx_files import Packed
    from surgery.backends.to_onnx import metadata

    value = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [2])
    weight = onnx.numpy_helper.from_array(np.arange(2, dtype=np.float32), "w")
    out = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [2])
    model = onnx.helper.make_model(onnx.helper.make_graph([onnx.helper.make_node("Add", ["x", "w"], ["y"])], "g", [value], [out], [weight]))
    metadata(model, "first", "1")
    packed = Packed.of(model)
    assert packed is not None
    metadata(model, "second", "2")
    tail = packed.tail(model)
    assert tail and onnx.ModelProto.FromString(packed.data + tail) == model
    metadata(model, "first", "changed")
    assert packed.tail(model) is None
