"""Schedules by their published figures, and the controller in a plain loop and under the Trainer."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from surgery.core.diagnostics import SurgeryError
from surgery.passes import registry
from surgery.passes.kinds import schedule
from surgery.train import Controller
from tests.workbench import bench_program, operation, run

Power = registry.get("train", "power")
StepLaw = registry.get("train", "step_law")


def test_power_figures() -> None:
    rule = Power(batch=256)
    assert rule.lr(1e9) == 0.02 and rule.lr(0) == 0.02
    assert 256 * 4 * 1e9**-0.51 == pytest.approx(0.0263, abs=5e-5)
    assert rule.lr(1e10) == pytest.approx(8.1339e-3, rel=1e-4)
    assert rule.lr(1e12) == pytest.approx(7.7678e-4, rel=1e-4)
    assert (0.02 / (256 * 4)) ** (1 / -0.51) == pytest.approx(1.7134e9, rel=1e-4)
    # the law behind it, published for 10T tokens and 1024 sequences: 0.0011
    assert Power(batch=1024, a=4.6).lr(1e13) == pytest.approx(1.104e-3, rel=1e-3)


def test_power_warm_up_and_decay() -> None:
    rule = Power(batch=1024, warmup_tokens=10**9, total_tokens=10**12, decay_tokens=10**11)
    assert rule.lr(0) == 0 and rule.lr(5e8) == rule.lr(1e9) / 2
    assert rule.lr(1e9 - 1) == pytest.approx(rule.lr(1e9), rel=1e-6)
    points = [rule.lr(n) for n in torch.logspace(9, 12, 400).tolist()]
    assert all(a >= b for a, b in pairwise(points))
    start = rule.lr(9e11)
    assert rule.lr(9.5e11) == pytest.approx(start * 0.1) and rule.lr(1e12 - 1) == pytest.approx(start * 0.01, rel=1e-6)
    assert rule.lr(1e12) == 0 and rule.lr(2e12) == 0
    assert Power(batch=1024, total_tokens=10**12, decay_tokens=10**11, decay="linear").lr(9.5e11) == pytest.approx(start / 2)
    assert Power(batch=2048).lr(1e12) == pytest.approx(2 * Power(batch=1024).lr(1e12))
    with pytest.raises(ValueError, match="do not fit"):
        Power(batch=8, total_tokens=10, decay_tokens=20)


def test_step_law_figures() -> None:
    rule = StepLaw(parameters=10**9, tokens=10**11)
    assert rule.peak() == pytest.approx(1.6325e-3, rel=1e-4)
    assert round(rule.batch()) == pytest.approx(1_107_715, rel=1e-5)
    assert rule.batch() / 2048 == pytest.approx(540.9, abs=0.05)
    assert rule.sequences(2048) == 541 and rule.sequences(2048, multiple=64) == 512
    big = StepLaw(parameters=7 * 10**9, tokens=14 * 10**11)
    assert big.peak() == pytest.approx(9.1656e-4, rel=1e-4) and big.batch() == pytest.approx(4_998_815, rel=1e-5)
    assert StepLaw(parameters=10**9, tokens=2 * 10**11).peak() / rule.peak() == pytest.approx(2**0.307)
    assert StepLaw(parameters=2 * 10**9, tokens=10**11).peak() / rule.peak() == pytest.approx(0.610, abs=5e-4)


def test_step_law_curve() -> None:
    rule = StepLaw(parameters=10**9, tokens=10**11)
    warm = 2000 * rule.batch()
    assert rule.lr(0) == 0 and rule.lr(warm / 2) == pytest.approx(rule.peak() / 2)
    assert rule.lr(warm) == pytest.approx(rule.peak()) and rule.lr(1e11) == pytest.approx(1e-5) == rule.lr(2e11)
    assert rule.lr((warm + 1e11) / 2) == pytest.approx((rule.peak() + 1e-5) / 2)


def test_step_law_counts_the_model_and_warns_when_a_part_is_frozen() -> None:
    program = bench_program()
    total = sum(p.numel() for p in program.graph.parameters())
    note = run(program, operation(program, "train", "step_law", [], tokens=10**9))[0].note
    bound, names = program.schedules[0]
    assert bound.parameters == total - 23 * 16 and names == () and "warning" not in note
    run(program, operation(program, "adapt", "lora", ["layers[0].attn.q"]))
    assert "warning" in run(program, operation(program, "train", "step_law", [], tokens=10**9))[0].note


def test_a_schedule_on_a_part_names_its_parameters_and_comes_back_from_data() -> None:
    program = bench_program()
    run(program, operation(program, "adapt", "lora", ["layers[0].ffn.up"]))
    run(program, operation(program, "train", "power", ["layers[0].ffn"], batch=8))
    method, names = program.schedules[0]
    assert set(names) == {"up.weight", "up.bias", "down.weight", "down.bias", "up.lora.A", "up.lora.B"}
    record = {"schedules": [{"method": {"verb": "train", "name": "power", "params": method.params()}, "targets": names}]}
    assert schedule.carried(json.loads(json.dumps(record))) == [(method, names)]


# ------------------------------------------------------------------ controller


class Recorder:
    """A method that writes down what it is told."""

    def __init__(self) -> None:
        self.seen: list[str] = []

    def prepare(self, module: nn.Module, data: Any) -> None:
        self.seen.append(f"prepare {data}")

    def step_begin(self, module: nn.Module, step: int) -> None:
        self.seen.append(f"step_begin {step}")

    def after_backward(self, module: nn.Module, step: int) -> None:
        assert module.weight.grad is not None
        self.seen.append(f"after_backward {step}")

    def before_optimizer(self, module: nn.Module, step: int) -> None:
        self.seen.append(f"before_optimizer {step}")

    def after_optimizer(self, module: nn.Module, step: int) -> None:
        assert module.weight.grad is not None
        self.seen.append(f"after_optimizer {step}")

    def extra_loss(self, module: nn.Module) -> Tensor:
        self.seen.append("extra_loss")
        return 0.5 * module.weight.square().sum()

    def finalise(self, module: nn.Module) -> None:
        self.seen.append("finalise")


class Acting(nn.Linear):
    def __init__(self) -> None:
        super().__init__(3, 3)
        self.method = Recorder()

    def surgery_events(self) -> tuple[Any, nn.Module]:
        return self.method, self


class Toy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 3)
        self.layer = Acting()

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        return {"loss": self.layer(self.embed(input_ids)).square().mean()}


def test_events_come_in_order_and_extra_losses_count() -> None:
    torch.manual_seed(0)
    model = Toy()
    controller = Controller(model, torch.optim.SGD(model.parameters(), lr=0.0))
    controller.prepare("data")
    ids = torch.zeros(2, 4, dtype=torch.long)
    loss = controller.step(lambda: model(ids)["loss"])
    controller.finalise()
    plain = model(ids)["loss"] + 0.5 * model.layer.weight.square().sum()
    torch.testing.assert_close(loss, plain.detach())
    assert model.layer.method.seen == [
        "prepare data", "step_begin 0", "extra_loss", "after_backward 0", "before_optimizer 0", "after_optimizer 0", "finalise",
    ]  # fmt: skip
    assert all(p.grad is None for p in model.parameters())


def test_rates_follow_the_tokens_and_resume_exactly() -> None:
    rule = Power(batch=4, warmup_tokens=40)

    def rates(controller: Controller, model: nn.Module, lengths: list[int]) -> list[float]:
        seen = []
        for n in lengths:
            controller.step(lambda n=n: model(torch.zeros(2, n, dtype=torch.long))["loss"])  # type: ignore[misc]
            seen.append(controller.optimizer.param_groups[0]["lr"])  # type: ignore[union-attr]
        return seen

    def fresh() -> tuple[Controller, nn.Module]:
        model = Toy()
        return Controller(model, torch.optim.SGD(model.parameters(), lr=1.0), schedules=[rule]), model

    lengths = [4, 6, 5, 9, 3, 20]
    whole = rates(*fresh(), lengths)
    before = [2 * sum(lengths[:i]) for i in range(len(lengths))]
    assert whole == [rule.lr(n) for n in before]
    first, model = fresh()
    part = rates(first, model, lengths[:3])
    second, model = fresh()
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert part + rates(second, model, lengths[3:]) == whole


def test_a_schedule_on_some_parameters_leaves_the_others() -> None:
    model = Toy()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.5)
    controller = Controller(model, optimizer, schedules=[(Power(batch=4), ("layer.weight",))])
    controller.step(lambda: model(torch.zeros(1, 4, dtype=torch.long))["loss"])
    rates = {id(p): g["lr"] for g in optimizer.param_groups for p in g["params"]}
    assert rates[id(model.layer.weight)] == 0.02 and rates[id(model.layer.bias)] == rates[id(model.embed.weight)] == 0.5
    assert sum(len(g["params"]) for g in optimizer.param_groups) == 3


def test_a_schedule_without_tokens_to_count_is_an_error() -> None:
    model = nn.Linear(2, 2)
    controller = Controller(model, torch.optim.SGD(model.parameters(), lr=1.0), schedules=[Power(batch=4)])
    with pytest.raises(SurgeryError) as caught:
        controller.step(lambda: model(torch.ones(1, 2)).sum())
    assert caught.value.diagnostics[0].code == "S0773"
    controller.step(lambda: model(torch.ones(1, 2)).sum(), tokens=5)
    assert controller.tokens == 5
    with pytest.raises(SurgeryError) as caught:
        Controller(model).step(lambda: model(torch.ones(1, 2)).sum())
    assert caught.value.diagnostics[0].code == "S0772"


def test_a_lambda_lr_gives_the_same_rates() -> None:
    rule = Power(batch=4, warmup_tokens=40)
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.3)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, rule.factor(16, 0.3))
    for step in range(5):
        assert optimizer.param_groups[0]["lr"] == pytest.approx(rule.lr(16 * step))
        optimizer.step()
        scheduler.step()


def test_under_the_trainer_and_resumed(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    from transformers import Trainer, TrainerCallback, TrainingArguments

    from surgery.train import Callback

    rule = Power(batch=2, warmup_tokens=30)
    data = [{"input_ids": torch.tensor([1, 2, 3, 4, 5]), "labels": torch.tensor(0)} for _ in range(16)]

    class Rates(TrainerCallback):
        def __init__(self) -> None:
            self.seen: list[float] = []

        def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.seen.append(kwargs["optimizer"].param_groups[0]["lr"])

    def train(steps: int, resume: bool) -> tuple[list[float], list[str]]:
        torch.manual_seed(0)
        model, rates = Toy(), Rates()
        args = TrainingArguments(
            output_dir=str(tmp_path), max_steps=steps, per_device_train_batch_size=2, save_steps=3, report_to=[], use_cpu=True, disable_tqdm=True,
        )  # fmt: skip
        trainer = Trainer(model, args, train_dataset=data, callbacks=[Callback(model, schedules=[rule]), rates])
        trainer.train(resume_from_checkpoint=resume)
        return rates.seen, model.layer.method.seen

    rates, events = train(3, resume=False)
    assert rates == [rule.lr(10 * i) for i in range(3)]
    assert events[:5] == ["step_begin 0", "extra_loss", "after_backward 0", "before_optimizer 0", "after_optimizer 0"]
    assert events[-1] == "finalise"
    rates, _ = train(6, resume=True)
    assert rates == [rule.lr(10 * i) for i in range(3, 6)]


@pytest.mark.parametrize("accumulated", [1, 2])
def test_an_extra_loss_counts_once_however_many_batches_a_step_has(accumulated: int, tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    from transformers import Trainer, TrainingArguments

    from surgery.train import Callback

    class Summed(Toy):
        def forward(self, input_ids: Tensor, labels: Tensor, num_items_in_batch: Any = None, **kwargs: Any) -> dict[str, Tensor]:  # type: ignore[override]
            assert num_items_in_batch is not None
            return {"loss": (self.layer(self.embed(input_ids))[..., 0] * labels.ne(-100)).sum() / num_items_in_batch}

    torch.manual_seed(0)
    model = Summed()
    before = model.layer.weight.detach().clone()
    labels = [[1, 1, -100], [1, -100, -100], [1, 1, 1], [1, 1, -100]]
    data = [{"input_ids": torch.arange(3), "labels": torch.tensor(row)} for row in labels]
    states = model.embed.weight.detach()[:3]
    pushed = torch.stack([states[i] for row in labels for i, x in enumerate(row) if x > 0]).mean(0)
    args = TrainingArguments(
        output_dir=str(tmp_path), max_steps=1, per_device_train_batch_size=4 // accumulated, gradient_accumulation_steps=accumulated, report_to=[],
        use_cpu=True, disable_tqdm=True, optim="sgd", learning_rate=0.1, lr_scheduler_type="constant", max_grad_norm=0, save_strategy="no",
    )  # fmt: skip
    Trainer(model, args, train_dataset=data, callbacks=[Callback(model)]).train()
    expected = before - 0.1 * before  # the extra loss pulls every weight to zero
    expected[0] -= 0.1 * pushed
    torch.testing.assert_close(model.layer.weight.detach(), expected)
