"""Heads along which the model counts numbers: the slopes of ALiBi, computed in the graph from the number of heads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from torch import nn

import surgery

WORDS: dict[str, Any] = {"vocab_size": 60, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def made(family: str) -> tuple[nn.Module, str, str]:
    """A model, the path of its blocks and that of the output projection in one; six heads are no power of two."""
    torch.manual_seed(0)
    if family == "mpt":
        config = tf.MptConfig(vocab_size=60, d_model=24, n_heads=6, n_layers=2, max_seq_len=32, expansion_ratio=1)
        model, blocks, out = tf.MptForCausalLM(config), "transformer.blocks", "attn.out_proj"
    else:
        config = tf.BloomConfig(**WORDS, hidden_size=24, n_layer=2, n_head=6)
        model, blocks, out = tf.BloomForCausalLM(config), "transformer.h", "self_attention.dense"
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return model.eval(), blocks, out


def masked(model: nn.Module, paths: dict[str, list[int]], ids: torch.Tensor) -> torch.Tensor:
    """The live model's scores with some heads' inputs of output projections set to zero."""

    def hook(gone: list[int]) -> Any:
        def zero(_: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
            x = args[0].clone().unflatten(-1, (6, 4))
            x[..., gone, :] = 0
            return (x.flatten(-2), *args[1:])

        return zero

    handles = [model.get_submodule(path).register_forward_pre_hook(hook(gone)) for path, gone in paths.items()]
    try:
        with torch.no_grad():
            return model(input_ids=ids).logits  # type: ignore[no-any-return]
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("family", ["mpt", "bloom"])
def test_heads_with_counted_slopes_go_together_and_alone(family: str, here: Path) -> None:
    model, blocks, out = made(family)
    model.save_pretrained("model")
    ids = torch.randint(3, 60, (2, 9), generator=torch.Generator().manual_seed(1))
    Path("scores.json").write_text('{"layers[0].attn": [0, 5, 4, 1, 6, 7], "layers[1].attn": [0, 5, 4, 1, 6, 7]}', "utf-8")
    chosen = 'score = file, scores = "scores.json"'
    together = surgery.compile(f'surg 1\n\nprune heads(keep = 4, {chosen}) on layers[*].attn\nemit torch to "cut"\n', "model")
    claims = {c["claim"]: c for c in together.certificates}
    assert claims["picked = counted"]["max_abs_error"] == 0.0 and claims["removed = masked"]["ok"]
    assert any("picked by an index" in fact for fact in together.plan.steps[0].facts)
    want = masked(model, {f"{blocks}.{i}.{out}": [0, 3] for i in range(2)}, ids)
    with torch.no_grad():
        got = surgery.load("cut").eval()(input_ids=ids).logits
        assert (got - want).abs().max() <= 1e-5
        assert (model(input_ids=ids).logits - want).abs().max() > 1e-2

    one = surgery.compile(f"surg 1\n\nprune heads(keep = 4, alone = true, {chosen}) on layers[1].attn\n", "model")
    want = masked(model, {f"{blocks}.1.{out}": [0, 3]}, ids)
    with torch.no_grad():
        assert (one.module.eval()(input_ids=ids).logits - want).abs().max() <= 1e-5
