"""Programs of the zoo's tiny models with their live values, for tests of passes."""

from __future__ import annotations

from functools import cache

from torch import Tensor, nn

from surgery.model import pytree
from surgery.model.program import Program
from surgery.opening import assemble
from tests import capture_support
from tests.zoo import ZOO


@cache
def _parts(family: str) -> tuple[Program, list[Tensor], nn.Module]:
    from surgery.model.program import ModelInfo
    from surgery.model.weights import Held, Weights

    entry = ZOO[family]
    captured = capture_support.captured(family)
    model = entry.make_model()
    state = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    weights = Weights()
    for name in captured.parameters:
        if name not in captured.constants and name not in captured.aliases:
            value = state[name].detach().clone()
            weights[name] = Held(tuple(value.shape), str(value.dtype).removeprefix("torch."), f"{family}:{name}", value)
    info = ModelInfo(f"zoo:{family}", family, entry.architecture, entry.plain_config, "float32")
    program = assemble(captured, weights, info)
    example = entry.inputs(2, 9)
    flat = pytree.flatten({k: example[k] for k in program.signature.parameters}, program.signature.in_spec)
    return program, flat, model


def zoo_program(family: str) -> tuple[Program, list[Tensor]]:
    """A fresh copy of the captured program, and flat inputs for it."""
    program, flat, _ = _parts(family)
    anatomy = program.anatomy
    out = program.copy()
    out._anatomy = anatomy
    return out, [t.clone() for t in flat]


def live_model(family: str) -> nn.Module:
    return _parts(family)[2]
