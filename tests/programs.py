"""Programs of live tiny models, and their emission, for tests of what comes after capture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from surgery.backends.protocol import EmitRequest
from surgery.backends.to_torch import BACKEND
from surgery.model.capture import capture_config
from surgery.model.live import Tensors
from surgery.model.program import ModelInfo, Program
from surgery.model.realise import held
from surgery.model.runtime import build_module
from surgery.model.weights import Weights
from surgery.opening import assemble
from surgery.passes import registry

TEXT = dict(vocab_size=99, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=64, max_position_embeddings=64)
LM = dict(pad_token_id=0, bos_token_id=1, eos_token_id=2)


def live(cls: type, config: Any, seed: int = 0, scale: float = 3.0) -> nn.Module:
    """A seeded model in evaluation mode; matrices are scaled up so that outputs are not nearly constant."""
    torch.manual_seed(seed)
    model: nn.Module = cls(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(scale) if p.ndim > 1 else p.add_(0.1 * torch.randn_like(p))
    return model


def program_for(model: Any) -> Program:
    captured = capture_config(model.config, type(model).__name__)
    state = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    weights = Weights()
    for name in captured.parameters:
        if name not in captured.constants and name not in captured.aliases:
            weights[name] = held(state[name])
    info = ModelInfo("test", model.config.model_type, type(model).__name__, model.config.to_dict(), "float32", "0" * 64)
    return assemble(captured, weights, info)


def module_for(model: Any) -> Any:
    program = program_for(model)
    return build_module(program, Tensors(registry.function).all(program))


def emitted(program: Program, target: Path, **more: Any) -> Path:
    BACKEND.emit(program, EmitRequest(target=target, params={}, tensors=Tensors(registry.function), **more))
    return target


def ids(batch: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 99, (batch, length), generator=torch.Generator().manual_seed(seed))


def padded(batch: int, length: int, left: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    tokens, mask = ids(batch, length), torch.ones(batch, length, dtype=torch.long)
    cut = slice(0, length // 3) if left else slice(length - length // 3, length)
    mask[0, cut], tokens[0, cut] = 0, 0
    return tokens, mask
