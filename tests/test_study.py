"""The streamed pass beside the whole model: same bits forwards, same gradients backwards, one part's weights at a time."""

from __future__ import annotations

import time
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from surgery.core.diagnostics import SurgeryError
from surgery.core.site import NodeRef
from surgery.model.data import Samples
from surgery.model.live import Tensors, live_root
from surgery.model.program import Program
from surgery.model.realise import held, no_functions, one_thread
from surgery.model.retarget import graphs_of
from surgery.model.study import Study
from surgery.model.study_grad import names_in
from surgery.model.study_loss import Objective
from surgery.model.study_run import in_order, writes
from surgery.opening import capture
from tests.captured_programs import live_model, zoo_program
from tests.data_support import codes, zoo_samples

FORWARD = ["bert", "albert", "gpt2", "llama", "mixtral", "t5", "bart", "swin", "resnet", "clip"]
BACKWARD = ["bert", "albert", "gpt2", "llama", "mixtral", "t5", "swin", "resnet"]


def study() -> Study:
    return Study(Tensors(no_functions))


def parameters(program: Program) -> list[str]:
    known = dict(program.graph.named_parameters(remove_duplicate=False))
    return [n for n in program.weights if n in known]


@pytest.mark.parametrize("family", FORWARD)
def test_streamed_outputs_are_those_of_the_whole_model_bit_for_bit(family: str) -> None:
    program, _ = zoo_program(family)
    samples, work = zoo_samples(program, family), study()
    got = work.outputs(program, samples)
    root = live_root(program, work.tensors, dtype=torch.float32).eval()
    assert len(got) == 2
    for batch, outputs in zip(samples.batches(program), got, strict=True):
        with one_thread(), torch.no_grad():
            want = root(*batch.inputs)
        want = want if isinstance(want, tuple) else (want,)
        assert len(want) == len(outputs) and all(torch.equal(a, b) for a, b in zip(outputs, want, strict=True))
    flat = work.flat_outputs(program, [batch.inputs for batch in samples.batches(program)])
    assert all(torch.equal(a, b) for x, y in zip(flat, got, strict=True) for a, b in zip(x, y, strict=True))


def test_a_text_model_sees_what_the_live_model_sees() -> None:
    program, _ = zoo_program("bert")
    rows = [{"input_ids": torch.arange(4, 4 + n)} for n in (5, 9, 3)]
    got = study().outputs(program, Samples(rows, batch=2))
    model = live_model("bert")
    for i, row in enumerate(rows):
        with torch.no_grad():
            want = model(input_ids=row["input_ids"][None]).last_hidden_state[0]
        found = got[i // 2][0][i % 2, : len(want)]
        assert (found - want).abs().max() < 1e-5


# ---------------------------------------------------------------- gradients


def whole_gradients(program: Program, samples: Samples, work: Study, names: list[str]) -> dict[str, Tensor]:
    root = live_root(program, work.tensors, dtype=torch.float64).eval()
    objective = Objective(program)
    total: Any = 0
    for batch in samples.batches(program, dtype=torch.float64):
        out = root(*batch.inputs)
        total = total + sum(objective.losses(out if isinstance(out, tuple) else (out,), batch))
    live = {program.aliases.get(n, n): p for n, p in root.named_parameters(remove_duplicate=False)}
    found = torch.autograd.grad(total, [live[n] for n in names], allow_unused=True)
    return {n: torch.zeros_like(live[n]) if g is None else g for n, g in zip(names, found, strict=True)}


@pytest.mark.parametrize("family", BACKWARD)
def test_streamed_gradients_are_those_of_the_whole_model(family: str) -> None:
    program, _ = zoo_program(family)
    samples, work, names = zoo_samples(program, family), study(), parameters(program)
    want = whole_gradients(program, samples, work, names)
    got = {n: g for n, g, sample in work.each_gradient(program, samples, names, per_sample=False, dtype=torch.float64) if sample == -1}
    assert sorted(got) == sorted(names)
    for name in names:
        assert (got[name] - want[name]).abs().max() <= 1e-6, name
    assert sum(bool(g.abs().sum() > 0) for g in got.values()) > len(names) / 2


class InPlace(nn.Module):
    """Changes a value in place that is read before and after."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
        self.gain = nn.Parameter(torch.rand(4))

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        kept = 2 * h
        h.add_(self.gain)
        return self.b(torch.relu_(h + kept)) + h


def test_gradients_through_operations_in_place() -> None:
    torch.manual_seed(0)
    model = InPlace()
    x = torch.randn(3, 4)
    program = capture(model, {"x": x})
    assert any(writes(n) for n in program.graph.graph.nodes)
    samples, names = Samples([{"x": one} for one in x], batch=2), ["a.weight", "a.bias", "b.weight", "gain"]
    want = whole_gradients(program, samples, study(), names)
    got = {n: g for n, g, _ in study().each_gradient(program, samples, names, per_sample=False, dtype=torch.float64)}
    assert all((got[n] - want[n]).abs().max() <= 1e-6 and got[n].abs().sum() > 0 for n in names)


@pytest.mark.parametrize("family", ["gpt2", "t5", "albert"])
def test_gradients_of_samples_add_up_whatever_fits_into_memory(family: str) -> None:
    """Shared and tied parameters included, with room for all samples and for one."""
    program, _ = zoo_program(family)
    samples, names = zoo_samples(program, family), parameters(program)
    total = {n: g for n, g, _ in study().each_gradient(program, samples, names, per_sample=False, dtype=torch.float64)}
    for room in (1 << 30, 1):
        found: dict[str, list[Tensor]] = {}
        numbers: dict[str, list[int]] = {}
        for name, gradient, sample in study().each_gradient(program, samples, names, max_bytes=room, dtype=torch.float64):
            found.setdefault(name, []).append(gradient.double())
            numbers.setdefault(name, []).append(sample)
        assert all(n == [0, 1, 2] for n in numbers.values())
        for name in names:
            assert (sum(found[name]) - total[name]).abs().max() <= 1e-6, name


def test_the_loss_of_a_causal_model_is_its_own() -> None:
    program, _ = zoo_program("llama")
    samples = Samples([{"input_ids": torch.arange(5, 5 + n)} for n in (6, 9)], batch=2)
    batch = next(samples.batches(program))
    root = live_root(program, Tensors(no_functions), dtype=torch.float32).eval()
    with torch.no_grad():
        got = Objective(program).losses(root(*batch.inputs), batch)
        for row, loss in zip(samples.rows, got, strict=True):
            ids = row["input_ids"][None]
            assert abs(float(live_model("llama")(input_ids=ids, labels=ids, use_cache=False).loss - loss)) < 1e-5


def test_output_sensitivity_does_not_depend_on_batch_or_padding() -> None:
    program, _ = zoo_program("bert")
    rows = [{"input_ids": torch.arange(4, 4 + n)} for n in (5, 9, 3)]
    root = live_root(program, Tensors(no_functions), dtype=torch.float32).eval()
    found = []
    for size in (1, 3):
        losses: list[Tensor] = []
        for batch in Samples(rows, batch=size).batches(program):
            with torch.no_grad():
                losses += Objective(program).losses(root(*batch.inputs), batch)
        found.append(torch.stack(losses))
    assert (found[0] - found[1]).abs().max() < 1e-4 and found[0].abs().min() > 0


def test_a_sample_of_one_token_predicts_nothing_and_spoils_nothing() -> None:
    program, _ = zoo_program("llama")
    longer = Samples([{"input_ids": torch.arange(5, 14)}], batch=2)
    both = Samples([*longer.rows, {"input_ids": torch.tensor([7])}], batch=2)
    a, b = ({n: g for n, g, _ in study().each_gradient(program, s, ["lm_head.weight"], per_sample=False)} for s in (longer, both))
    assert (a["lm_head.weight"] - b["lm_head.weight"]).abs().max() < 1e-6


# ---------------------------------------------------------------- memory and order


class Counting(Tensors):
    """Notes how many layers have tensors alive whenever one is handed out."""

    def __init__(self) -> None:
        super().__init__(no_functions)
        self.alive: list[tuple[str, Any]] = []
        self.most = 0

    def fresh(self, program: Program, name: str, memo: dict[str, Any]) -> Tensor:
        value = super().fresh(program, name, memo)
        if ".layers." in name:
            layer = ".".join(name.split(".")[: name.split(".").index("layers") + 2])
            self.alive = [(where, ref) for where, ref in self.alive if ref() is not None]
            memory = value.numpy().copy()  # lives as long as any tensor over it, whatever object wraps it
            value = torch.from_numpy(memory)
            self.alive.append((layer, weakref.ref(memory)))
            del memory
            self.most = max(self.most, len({where for where, _ in self.alive}))
        return value


def test_one_layer_is_in_memory_at_a_time() -> None:
    program, _ = zoo_program("llama")
    samples = zoo_samples(program, "llama")
    for work in ("outputs", "gradients"):
        counting = Counting()
        one = Study(counting)
        if work == "outputs":
            one.outputs(program, samples)
        else:
            one.gradients(program, samples, parameters(program), lambda name, gradient, sample: None)
        assert counting.most == 1, work


def test_what_nothing_looks_at_is_not_read() -> None:
    program, _ = zoo_program("llama")
    read: list[str] = []

    class Noting(Tensors):
        def fresh(self, program: Program, name: str, memo: dict[str, Any]) -> Tensor:
            read.append(name)
            return super().fresh(program, name, memo)

    seen: list[Tensor] = []
    ref = NodeRef("model.layers.1", "self_attn_o_proj")
    Study(Noting(no_functions)).observe(program, zoo_samples(program, "llama"), inputs={ref: lambda value, keep: seen.append(value)})
    assert len(seen) == 2 and any(n.startswith("model.layers.1") for n in read)
    assert not any(n.startswith(("model.layers.2", "lm_head")) for n in read)


def test_hooks_see_the_values_and_the_real_tokens() -> None:
    program, _ = zoo_program("bert")
    rows = [{"input_ids": torch.arange(4, 4 + n)} for n in (5, 9, 3)]
    seen: list[tuple[Tensor, Tensor | None]] = []
    attention: list[Tensor | None] = []
    refs = {"encoder.layer.1": "intermediate_dense"}
    (path, name), = refs.items()  # fmt: skip
    product = next(
        n.name for n in program.module(path).graph.nodes if "attention" in str(n.target) and n.op == "call_module" and len(n.args) > 2
    )
    study().observe(
        program, Samples(rows, batch=3), inputs={NodeRef(path, name): lambda value, keep: seen.append((value, keep))},
        outputs={NodeRef(path, product): lambda value, keep: attention.append(keep)},
    )  # fmt: skip
    live: list[Tensor] = []
    module = live_model("bert").get_submodule(f"{path}.intermediate.dense")
    handle = module.register_forward_pre_hook(lambda _, args: live.append(args[0]))
    with torch.no_grad():
        for row in rows:
            live_model("bert")(input_ids=row["input_ids"][None])
    handle.remove()
    (value, keep), = seen  # fmt: skip
    assert keep is not None and keep.tolist() == [[j < n for j in range(9)] for n in (5, 9, 3)]
    assert (value[keep] - torch.cat([v[0] for v in live])).abs().max() < 1e-5
    assert attention[0] is not None and attention[0].shape == (3, 4, 9) and torch.equal(attention[0][:, 1], keep)


def test_routed_tokens_keep_their_padding() -> None:
    program, _ = zoo_program("mixtral")
    rows = [{"input_ids": torch.arange(4, 4 + n)} for n in (5, 9)]
    calls: list[tuple[Any, Tensor]] = []
    path = "model.layers.0"
    name = next(n.name for n in program.module(path).graph.nodes if "_grouped_mm" in str(n.target))
    down = [n.name for n in program.module(path).graph.nodes if "_grouped_mm" in str(n.target)][1]
    second: list[Tensor] = []
    study().observe(program, Samples(rows, batch=2), calls={
        NodeRef(path, name): lambda args, result, keep: calls.append((args, keep(0))),
        NodeRef(path, down): lambda args, result, keep: second.append(keep(0)),
    })  # fmt: skip
    (args, keep), = calls  # fmt: skip
    assert keep.shape == (36,) and int(keep.sum()) == 2 * 14 and torch.equal(second[0], keep)
    alone: list[Tensor] = []
    for row in rows:
        study().observe(program, Samples([row]), calls={NodeRef(path, name): lambda args, result, keep: alone.append(args[0])})
    got, want = args[0][keep], torch.cat(alone)
    nearest = torch.cdist(got.double(), want.double()).min(1).values
    assert got.shape == want.shape and nearest.max() < 1e-4


def test_settle_changes_what_later_layers_see_and_only_that() -> None:
    """Weights replaced in layer 1 reach layer 2; the inputs of layer 1 and their number stay."""
    program, _ = zoo_program("llama")
    samples = zoo_samples(program, "llama")
    name = "model.layers.1.mlp.down_proj.weight"
    changed = program.copy()
    changed.weights[name] = held(torch.zeros(program.weights[name].shape))
    refs = [NodeRef(f"model.layers.{i}", "self_attn_q_proj") for i in range(3)]

    def inputs_of(program: Program, settle: Any = None) -> list[list[Tensor]]:
        seen: list[list[Tensor]] = [[], [], []]
        hooks = {ref: (lambda value, keep, i=i: seen[i].append(value)) for i, ref in enumerate(refs)}
        study().observe(program, samples, inputs=hooks, settle=settle)  # type: ignore[arg-type]
        return seen

    asked: list[tuple[str, ...]] = []

    def settle(names: tuple[str, ...]) -> bool:
        asked.append(names)
        if name not in names:
            return False
        program.weights[name] = changed.weights[name]
        return True

    want, before = inputs_of(changed), inputs_of(program)
    got = inputs_of(program, settle)
    for i in range(3):
        assert len(got[i]) == 2 and all(torch.equal(a, b) for a, b in zip(got[i], want[i], strict=True))
    assert not torch.equal(got[2][0], before[2][0])
    flat = [n for names in asked for n in names]
    assert len(flat) == len(set(flat)) and name in flat


def test_shared_parameters_settle_at_their_last_use() -> None:
    program, _ = zoo_program("albert")
    asked: list[tuple[str, ...]] = []
    ref = NodeRef("", program.graph.graph.find_nodes(op="call_module", target="pooler")[0].name)
    seen = 0

    def hook(value: Tensor, keep: Tensor | None) -> None:
        nonlocal seen
        seen += 1

    study().observe(program, zoo_samples(program, "albert"), inputs={ref: hook}, settle=lambda names: bool(asked.append(names)))
    inside = [names for names in asked if any("albert_layers" in n for n in names)]
    assert seen == 2 and len(inside) == 1


@pytest.mark.parametrize("family", ["bert", "mixtral"])
def test_the_number_of_threads_changes_no_bit(family: str) -> None:
    """Outputs, what hooks see and in which order, and gradients; with two threads two batches run side by side."""
    program, _ = zoo_program(family)
    samples, names = zoo_samples(program, family, 5, batch=1), parameters(program)[:12]
    refs = [
        NodeRef(path, node.name) for path, module in graphs_of(program.graph) if path
        for node in module.graph.nodes if node.op == "call_module"
    ]  # fmt: skip
    found = []
    before = torch.get_num_threads()
    for threads in (1, 2):
        torch.set_num_threads(threads)
        try:
            seen: list[Tensor] = []
            study().observe(program, samples, inputs=dict.fromkeys(refs, lambda value, keep, seen=seen: seen.append(value)))
            outputs = [t for out in study().outputs(program, samples) for t in out]
            gradients = [g for _, g, _ in study().each_gradient(program, samples, names)]
            found.append([*seen, *outputs, *gradients])
            assert torch.get_num_threads() == threads
        finally:
            torch.set_num_threads(before)
    assert len(found[0]) == len(found[1]) > 60
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_work_side_by_side_comes_in_order_and_errors_come_out() -> None:
    running, most = 0, 0

    def work(i: int) -> int:
        nonlocal running, most
        running += 1
        most = max(most, running)
        time.sleep(0.01 * (3 - i % 3))
        running -= 1
        if i == 7:
            raise ValueError("seven")
        return i

    assert list(in_order(work, 6, 3)) == list(range(6)) and most == 3
    with pytest.raises(ValueError, match="seven"):
        list(in_order(work, 9, 3))


def test_progress_counts_parts() -> None:
    program, _ = zoo_program("llama")
    told: list[tuple[Any, ...]] = []
    Study(Tensors(no_functions), lambda *what: told.append(what)).outputs(program, zoo_samples(program, "llama"))
    parts = sum(n.op == "call_module" for n in program.graph.graph.nodes)
    assert [t[1:] for t in told] == [(i, parts) for i in range(1, parts + 1)] and parts >= 5


def test_values_that_are_not_finite_are_named() -> None:
    program, _ = zoo_program("bert")
    name = "encoder.layer.1.output.dense.weight"
    program.weights[name] = held(torch.full(program.weights[name].shape, 3e38))
    with pytest.raises(SurgeryError) as error:
        study().outputs(program, zoo_samples(program, "bert"))
    assert codes(error) == ["S0753"] and "`encoder.layer.1`" in str(error.value)
    program.weights[name] = held(torch.full(program.weights[name].shape, float("nan")))
    with pytest.raises(SurgeryError) as error:
        study().outputs(program, zoo_samples(program, "bert"))
    assert codes(error) == ["S0752"] and name in str(error.value)


def test_names_in_follows_aliases() -> None:
    program, _ = zoo_program("t5")
    found = [n for node in program.graph.graph.nodes for n in names_in(program, node)]
    assert found.count("shared.weight") == 2 and "encoder.embed_tokens.weight" not in found
