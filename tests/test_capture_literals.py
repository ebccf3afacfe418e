"""What a model's code writes in Python is captured with its values; sizes that torch's own product of sorted rows refuses are captured too."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as tf
from torch import Tensor, nn
from transformers import DynamicCache

from surgery.core.diagnostics import SurgeryError
from surgery.model.sample import placeholders, sample_inputs
from surgery.opening import capture
from surgery.passes.verify import verify
from tests.cut_support import free, remove
from tests.dims_models import LM, MODELS, WIDE, ids


class Made(nn.Module):
    """Literals in every form: lists in indices, read and written, and tensors made beside the data."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)[:, [3, 0, 2, 1]][..., [True, False, True, True]]
        y = y * torch.tensor([1.1, 2.0, -3.0], device=x.device) + torch.as_tensor([0.1, 0.2, 0.3], dtype=x.dtype, device=x.device)
        z = y.new_tensor([0.7, 0.5, 0.3]) * torch.ones_like(y)
        z[:, [0, 2]] = y[:, [2, 0]]
        return y + z


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_literals_keep_their_values(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = Made().to(dtype)
    x = torch.randn(2, 4, dtype=dtype)
    program = capture(model, (x,))
    assert not any(t.device.type == "meta" for t in (w.tensor for n, w in program.weights.items() if "constant" in n))  # type: ignore[attr-defined]
    with torch.no_grad():
        assert torch.equal(remove(program, {}).run([x], dtype)[0], model(x))


@pytest.mark.parametrize("name", ["falcon", "falcon_mqa"])
def test_live_falcon(name: str) -> None:
    torch.manual_seed(0)
    model, inputs = MODELS[name]()
    model.eval()
    program = capture(model, inputs)
    verify(program, "capture")
    given = list(inputs.values())
    with torch.no_grad():
        assert torch.equal(remove(program, {}).run(given)[0], model(**inputs).logits)
    leaf = next(leaf for leaf in free(program.dims) if leaf.size > 2)
    assert remove(program, {leaf: [1]}).error(given) <= 1e-5


MOE: dict[str, Any] = {
    "qwen2_moe": lambda: tf.Qwen2MoeForCausalLM(tf.Qwen2MoeConfig(
        **WIDE, **LM, num_key_value_heads=2, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=12,
        shared_expert_intermediate_size=14, use_cache=False)),
    "gpt_oss": lambda: tf.GptOssForCausalLM(tf.GptOssConfig(
        **WIDE, **LM, num_key_value_heads=2, head_dim=6, num_local_experts=4, num_experts_per_tok=2, sliding_window=4, use_cache=False)),
}  # fmt: skip


@pytest.mark.parametrize("name", MOE)
def test_live_experts_of_any_width(name: str) -> None:
    torch.manual_seed(0)
    model = MOE[name]().eval()
    program = capture(model, {"input_ids": ids()})
    verify(program, "capture")
    assert any("grouped_mm" in str(n.target) for n in program.dims.graph.nodes)
    with torch.no_grad():
        assert torch.equal(remove(program, {}).run([ids()])[0], model(ids()).logits)


def test_samples_of_a_decoder_with_a_live_cache() -> None:
    """The mask covers the fixed cache and the new steps, so that a certificate can run both models."""
    torch.manual_seed(0)
    model = tf.LlamaForCausalLM(tf.LlamaConfig(**WIDE, **LM, num_key_value_heads=2, head_dim=6)).eval()
    with torch.no_grad():
        cache: Any = model(ids(4), use_cache=True).past_key_values
    assert isinstance(cache, DynamicCache)
    inputs = {"input_ids": ids(3), "attention_mask": torch.ones(2, 7, dtype=torch.long), "past_key_values": cache, "use_cache": True}
    program = capture(model, inputs)
    for length in (16, 5):
        given = sample_inputs(program, length=length)
        shapes = {name: tuple(t.shape) for (name, _), t in zip(placeholders(program), given, strict=True)}
        assert shapes["input_ids"] == (2, length) and shapes["attention_mask"] == (2, length + 4)
        assert shapes["past_key_values_key_0"] == (2, 2, 4, 6)
        assert remove(program, {}).run(given)[0].shape == (2, length, 60)


def test_values_that_stay_on_meta_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Lost(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x[:, [0, 1]]

    monkeypatch.setattr("surgery.model.capture.literals._index", lambda index, top: index)
    with pytest.raises(SurgeryError) as caught:
        capture(Lost(), (torch.randn(2, 3),))
    assert caught.value.diagnostics[0].code == "S0501" and "values cannot be captured" in str(caught.value)
