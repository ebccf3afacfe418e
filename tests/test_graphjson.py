"""The graph tree as data: round trips, size, and what crafted data is refused with."""

from __future__ import annotations

import copy
import json

import pytest
import torch
import transformers as T
from torch import fx, nn

from surgery.core.diagnostics import SurgeryError
from surgery.model import graphjson, modules, oplist
from surgery.model.program import ValueSpec
from tests.programs import TEXT, live, program_for


@pytest.fixture(scope="module")
def bert():
    return program_for(live(T.BertForMaskedLM, T.BertConfig(**TEXT)))


def layered(layers: int = 3) -> fx.GraphModule:
    """A root of equal layer graphs, as capture makes them."""
    root, graph = nn.Module(), fx.Graph()
    value = graph.placeholder("x")
    value.meta["spec"] = ValueSpec("tensor", "bfloat16", (2, 8))
    root.layers = nn.Module()
    for i in range(layers):
        inner = fx.Graph()
        x = inner.placeholder("x")
        y = inner.call_module("fc", (x,))
        y = inner.call_function(torch.ops.aten.gelu.default, (y,), {"approximate": "tanh"})
        y = inner.call_function(torch.ops.aten.clamp.default, (y, float("-inf"), 3.0))
        inner.output(y)
        holder = nn.Module()
        holder.fc = nn.Linear(8, 8, dtype=torch.bfloat16, device="meta")
        root.layers.add_module(str(i), fx.GraphModule(holder, inner))
        value = graph.call_module(f"layers.{i}", (value,))
    graph.output((value,))
    return fx.GraphModule(root, graph)


def text(root: fx.GraphModule) -> str:
    return json.dumps(graphjson.dump(root))


def refused(code: str, data: object, match: str = "") -> None:
    with pytest.raises(SurgeryError, match=match) as caught:
        graphjson.load(json.loads(json.dumps(data)))
    assert caught.value.diagnostics[0].code == code, caught.value


def test_round_trip_is_byte_identical(bert):
    first = text(bert.graph)
    again = graphjson.load(json.loads(first))
    assert text(again) == first
    assert len(first) < 30_000
    assert {n: p.shape for n, p in again.named_parameters()} == {n: p.shape for n, p in bert.graph.named_parameters()}


def test_specs_and_symbols_come_back_equal(bert):
    again = graphjson.load(json.loads(text(bert.graph)))
    before = {n.name: n.meta.get("spec") for n in bert.graph.graph.nodes}
    after = {n.name: n.meta.get("spec") for n in again.graph.nodes}
    assert before == after and any(not isinstance(s, int) for s in after["input_ids"].shape)


def test_tied_names_stay_one_parameter(bert):
    again = graphjson.load(json.loads(text(bert.graph)))
    names = dict(again.named_parameters(remove_duplicate=False))
    groups: dict[int, list[str]] = {}
    for name, tensor in names.items():
        groups.setdefault(id(tensor), []).append(name)
    assert ["bert.embeddings.word_embeddings.weight", "cls.predictions.decoder.weight"] in groups.values()


def test_equal_layers_are_stored_once():
    small, large = text(layered(2)), text(layered(80))
    assert len(large) - len(small) < 78 * 140
    again = graphjson.load(json.loads(large))
    assert text(again) == large
    params = dict(again.named_parameters())
    assert len(params) == 160 and len({id(p) for p in params.values()}) == 160


def test_the_loaded_tree_computes_the_same():
    source = layered(2).to_empty(device="cpu").float()
    again = graphjson.load(json.loads(text(source))).to_empty(device="cpu")
    with torch.no_grad():
        for name, p in source.named_parameters():
            nn.init.normal_(p)
            again.get_parameter(name).copy_(p)
    x = torch.randn(2, 8)
    assert torch.equal(source(x)[0], again(x)[0])


def test_every_listed_operation_exists_and_only_listed_ones_write():
    for name in sorted(oplist.ATEN):
        assert oplist.overload(name)._schema.is_mutable == (name in oplist.IN_PLACE), name
    for name in ("aten.from_file.default", "aten.set_.source_Storage", "aten.resize_.default", "aten.as_strided.default"):
        assert name not in oplist.ATEN


def test_unknown_operation_cannot_be_written():
    root = layered(1)
    root.graph.inserting_before(next(n for n in root.graph.nodes if n.op == "output")).__enter__()
    root.graph.call_function(torch.ops.aten.from_file.default, ("secret",))
    with pytest.raises(SurgeryError, match=r"S0824: node from_file\w* of the model uses the operation aten.from_file.default"):
        graphjson.dump(root)


def test_unregistered_class_cannot_be_written():
    root = layered(1)
    root.layers.get_submodule("0").fc = nn.Bilinear(2, 2, 2)
    with pytest.raises(SurgeryError, match=r"S0825: modules of class torch.nn.modules.linear.Bilinear cannot be stored"):
        graphjson.dump(root)


EVIL_NAMES = [
    "x):\n    import os; os.system('touch /tmp/owned')\n#", "x=__import__('os')", "__class__", "a b", "lambda", "x;y", "import", "é", "", "self.x", 7,
]  # fmt: skip


@pytest.mark.parametrize("evil", EVIL_NAMES)
@pytest.mark.parametrize("place", ["node", "input", "keyword", "child", "parameter", "module", "attribute"])
def test_crafted_names_never_reach_generated_code(place, evil):
    data = graphjson.dump(layered(1))
    layer = next(m for m in data["modules"] if "nodes" in m)
    root = data["modules"][data["root"]]
    gelu = next(n for n in layer["nodes"] if n[2] == "aten.gelu.default")
    if place == "node":
        gelu[0] = evil
    elif place == "input":
        layer["nodes"][0][2] = evil
    elif place == "keyword":
        gelu[4] = {str(evil): 1}
    elif place == "child":
        layer["children"] = {str(evil): 0}
    elif place == "parameter":
        root["parameters"] = [[evil, "float32", [2]]]
    elif place == "module":
        layer["nodes"][1][2] = evil
    else:
        root["nodes"].insert(1, ["leak", "get", evil, [], {}, None])
    refused("S0826", data)


@pytest.mark.parametrize(
    "path", ["__class__", "fc.__init__.__globals__", "forward", "layers.0.forward", "layers", "_parameters", "training"]
)
def test_attributes_lead_to_tensors_only(path):
    data = graphjson.dump(layered(1))
    data["modules"][data["root"]]["nodes"].insert(1, ["leak", "get", path, [], {}, None])
    refused("S0826", data)


def test_strings_in_arguments_are_data():
    data = graphjson.dump(layered(1))
    layer = next(m for m in data["modules"] if "nodes" in m)
    evil = "'); __import__('os').system('touch /tmp/owned'); ('\n"
    next(n for n in layer["nodes"] if n[2] == "aten.gelu.default")[4] = {"approximate": evil}
    loaded = graphjson.load(json.loads(json.dumps(data)))
    assert repr(evil) in loaded.layers.get_submodule("0").code
    node = next(n for n in loaded.layers.get_submodule("0").graph.nodes if n.op == "call_function")
    assert node.kwargs["approximate"] == evil


@pytest.mark.parametrize(
    "target", ["aten.from_file.default", "py:os.system", "operator.methodcaller", "builtins.eval", "os.system", "math.__loader__"]
)
def test_unknown_operations_are_named(target):
    data = graphjson.dump(layered(1))
    next(m for m in data["modules"] if "nodes" in m)["nodes"][2][2] = target
    refused("S0824", data, target.split("(")[0])


def test_unknown_module_class_is_named():
    data = graphjson.dump(layered(1))
    next(m for m in data["modules"] if "tag" in m)["tag"] = "os:system"
    refused("S0825", data, "os:system")


def test_changed_schema_is_explained():
    data = graphjson.dump(layered(1))
    data["ops"]["aten.gelu.default"] = "aten::gelu(Tensor self, int other, str approximate) -> Tensor"
    refused("S0827", data, "aten.gelu.default")


def test_an_older_schema_that_still_fits_is_accepted():
    data = graphjson.dump(layered(1))
    data["ops"]["aten.gelu.default"] = "aten::gelu(Tensor self) -> Tensor"
    graphjson.load(data)


def damage(change):
    data = graphjson.dump(layered(2))
    change(data)
    return data


@pytest.mark.parametrize(
    "change",
    [
        lambda d: d.update(schema="surgery.graph/9"),
        lambda d: d.update(root=99),
        lambda d: d.update(root=0),
        lambda d: d.pop("symbols"),
        lambda d: d["symbols"].update({"s0 + __import__('os')": "i"}),
        lambda d: d["specs"].append({"k": "tensor", "d": "float32", "s": [["__import__", "os"]]}),
        lambda d: d["specs"].append({"k": "tensor", "d": "float32", "s": [["**", 9, ["**", 9, 9]]]}),
        lambda d: d["modules"][d["root"]].update(children={"layers": d["root"]}),
        lambda d: d["modules"][0].update(config={"in_features": 8, "out_features": -8, "bias": True}),
        lambda d: d["modules"][0].update(config={"in_features": "8; import os", "out_features": 8, "bias": True}),
        lambda d: d["modules"][0].update(dtype="system"),
        lambda d: d["modules"][d["root"]]["nodes"].pop(),
        lambda d: d["modules"][d["root"]]["nodes"].append(["x", "in", "x", [], {}, None]),
        lambda d: d["modules"][d["root"]]["nodes"][0].__setitem__(3, [5]),
        lambda d: d["modules"][d["root"]]["nodes"][1].__setitem__(3, [{"n": "later"}]),
        lambda d: d["modules"][d["root"]]["nodes"][1].__setitem__(3, [{"eval": "1"}]),
        lambda d: d["modules"][d["root"]]["nodes"][1].__setitem__(2, "layers"),
        lambda d: d["aliases"].append(["layers.0.fc.weight", "layers.9.fc.weight"]),
    ],
)
def test_damage_is_one_diagnostic(change):
    refused("S0826", damage(change))


def test_a_small_file_cannot_unfold_to_a_huge_model():
    data = graphjson.dump(layered(1))
    table = [{"tag": "nn.Identity", "config": {}}]
    for i in range(40):
        table.append({"children": {"a": i, "b": i}})
    table.append({**data["modules"][data["root"]], "children": {"layers": 40}})
    data.update(modules=table, root=len(table) - 1)
    refused("S0826", data, "unfolds")


class Doubled(nn.Module):
    """A registered class with a child of its own and one that somebody attached."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width
        self.inner = nn.Linear(width, width)

    def module_config(self):
        return {"width": self.width}

    @classmethod
    def from_config(cls, config):
        return cls(config["width"])

    def forward(self, x):
        return self.inner(x) * 2


def test_registered_classes_round_trip_with_attached_children(monkeypatch):
    monkeypatch.setattr(modules, "_BY_TAG", {})
    monkeypatch.setattr(modules, "_TAG_OF", {})
    modules.register_module("tests.doubled", Doubled)
    root = layered(1)
    leaf = Doubled(8).to(torch.bfloat16).to("meta")
    leaf.add_module("lora", nn.Linear(8, 2, dtype=torch.float32, device="meta"))
    root.layers.get_submodule("0").fc = leaf
    data = json.loads(text(root))
    again = graphjson.load(data)
    assert text(again) == text(root)
    assert again.get_parameter("layers.0.fc.inner.weight").dtype == torch.bfloat16
    assert again.get_parameter("layers.0.fc.lora.weight").dtype == torch.float32
    monkeypatch.setattr(modules, "_BY_TAG", {})
    monkeypatch.setattr(modules, "_TAG_OF", {})
    refused("S0825", data, "tests.doubled")
    found = graphjson.load(copy.deepcopy(data), modules=lambda tag: Doubled if tag == "tests.doubled" else None)
    assert isinstance(found.get_submodule("layers.0.fc"), Doubled)
