"""Models for tracing: parameters on meta, buffers with their values, no weight ever allocated for good."""

from __future__ import annotations

import contextlib
import copy
import logging
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from surgery.core.diagnostics import fail


@contextlib.contextmanager
def _no_chatter() -> Iterator[None]:
    """Without transformers' warnings: they advise the author of a model, and a plan prints what matters to it."""
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


@contextlib.contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Parameters move to meta as soon as a module registers them; buffers are computed for real.

    The constructor's own memory is never touched (initialisers are off), so it costs address space only.
    """
    from transformers.initialization import no_init_weights

    register = nn.Module.register_parameter

    def on_meta(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        register(self, name, param)
        if param is not None and param.device.type != "meta":
            self._parameters[name] = nn.Parameter(param.detach().to("meta"), requires_grad=param.requires_grad)

    nn.Module.register_parameter = on_meta  # type: ignore[method-assign]
    try:
        with no_init_weights():
            yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def as_config(config: Any) -> Any:
    """A transformers config from itself or from a plain dict with ``model_type``; always a copy."""
    from transformers import AutoConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    if not isinstance(config, dict):
        return copy.deepcopy(config)
    rest = {k: v for k, v in config.items() if k not in ("model_type", "transformers_version")}
    family = config.get("model_type")
    if family not in CONFIG_MAPPING:
        raise fail(
            "S0504", f"transformers knows no model family {family!r}",
            help="check `model_type` in config.json; a model with code of its own is opened with python:",
        )  # fmt: skip
    try:
        with _no_chatter():
            return AutoConfig.for_model(str(family), **copy.deepcopy(rest))
    except Exception as error:  # a value of a wrong type, or one that the family refuses: the class of the error is the library's own
        said = " ".join(str(error.__cause__ or error).split())[:200]
        raise fail(
            "S0504", f"transformers refuses this config of a {family}: {said}", help="correct the value in config.json"
        ) from error  # fmt: skip


def model_class(config: Any, architecture: str | None) -> type[Any]:
    """The transformers class called ``architecture``, else the config's own, else the family's base model."""
    import transformers

    names = [architecture] if architecture else list(getattr(config, "architectures", None) or [])
    if names:
        found = getattr(transformers, str(names[0]), None)
        if not isinstance(found, type) or not issubclass(found, transformers.PreTrainedModel):
            raise fail("S0504", f"transformers has no model class {names[0]!r}", help="check `architectures` in config.json")
        return found
    try:
        return transformers.AutoModel._model_mapping[type(config)]
    except KeyError as error:
        raise fail("S0504", f"transformers has no base model for {type(config).__name__}", help="name the model class") from error


def draws_spec_augment(config: Any) -> bool:
    """Whether the model of this config, or a part of it, masks its features at random in training."""
    parts = [getattr(config, name, None) for name in getattr(config, "sub_configs", {})]
    own = getattr(config, "apply_spec_augment", False) and (
        getattr(config, "mask_time_prob", 0) > 0 or getattr(config, "mask_feature_prob", 0) > 0
    )
    return bool(own) or any(draws_spec_augment(part) for part in parts if part is not None)


def _steady(config: Any) -> None:
    """Switches off what has no graph: SpecAugment draws its masks with numpy; overlapping strides fix a length."""
    if getattr(config, "apply_spec_augment", False):
        config.apply_spec_augment = False
    config.__dict__["onnx_export"] = True  # Longformer and LED then cut their windows in a way that a graph of any length can
    for sub in getattr(config, "sub_configs", {}):
        inner = getattr(config, sub, None)
        if inner is not None:
            _steady(inner)


def stop_clipping(model: nn.Module) -> float | None:
    """Switches off what Gemma 3n does to its weights in training only: it writes the clipped AltUp coefficients back into the
    parameter, which no graph can say, and an evaluation never clips. The bound, or None where the model has none.

    ``model`` and the configs that its modules hold must be our own copies.
    """
    bound: float | None = None
    for config in {id(c): c for m in model.modules() if (c := m.__dict__.get("config")) is not None}.values():
        found = getattr(config, "altup_coef_clip", None)
        if found is not None:
            bound = float(found)
            config.__dict__["altup_coef_clip"] = None  # a checked field: assigning would ask for a number
    return bound


def hf_model(config: Any, cls: type[Any], *, uniform: bool = False) -> tuple[nn.Module, dict[str, Tensor]]:
    """An instance on meta in train mode, written in bfloat16, and the values of its buffers by full name. ``uniform``: also of those
    parameters that the class makes in float32 whatever its dtype.

    It is built in full precision, so that numbers computed while building are not rounded, and then given the dtypes that the
    same model built in bfloat16 has (some tensors stay float32 in any model). Raises S0504 if it cannot be built.
    """
    own = copy.deepcopy(config)
    _steady(own)
    own.return_dict = True
    try:
        with _no_chatter(), _parameters_on_meta():
            lower: nn.Module = cls._from_config(copy.deepcopy(own), dtype=torch.bfloat16)
            model: nn.Module = cls._from_config(own, dtype=torch.float32)
            model.tie_weights()  # type: ignore[operator]  # part of the initialisation that is off here
    except Exception as error:
        first = str(error).splitlines()[0][:200] if str(error) else ""
        raise fail(
            "S0504", f"{cls.__name__} cannot be built from this config: {type(error).__name__}: {first}",
            help="the sizes in config.json must fit each other",
        ) from error  # fmt: skip
    hoist_plain_tensors(lower)
    hoist_plain_tensors(model)
    own.dtype = torch.bfloat16
    for name in getattr(own, "sub_configs", {}):
        if getattr(own, name, None) is not None:
            getattr(own, name).dtype = torch.bfloat16
    values: dict[str, Tensor] = {}
    made: dict[int, tuple[Tensor, Tensor]] = {}
    for (path, module), like in zip(model.named_modules(), lower.modules(), strict=True):
        for table, twins in ((module._parameters, like._parameters), (module._buffers, like._buffers)):
            for name, tensor in table.items():
                twin = twins.get(name)
                if tensor is None or twin is None:
                    continue
                if not isinstance(tensor, nn.Parameter):
                    values[f"{path}.{name}" if path else name] = tensor
                if id(tensor) not in made:
                    is_parameter = isinstance(tensor, nn.Parameter)
                    dtype = torch.bfloat16 if uniform and is_parameter and twin.dtype is torch.float32 else twin.dtype
                    meta = torch.empty_like(tensor, dtype=dtype, device="meta", requires_grad=False)
                    made[id(tensor)] = (tensor, nn.Parameter(meta, requires_grad=tensor.requires_grad) if is_parameter else meta)
                table[name] = made[id(tensor)][1]  # type: ignore[assignment]
    return model.train(), values


def main_dtype(module: nn.Module) -> torch.dtype | None:
    """The floating dtype that most parameters have (buffers, where there are no parameters)."""
    counted = Counter(p.dtype for p in module.parameters() if p.dtype.is_floating_point)
    counted = counted or Counter(b.dtype for b in module.buffers() if b.dtype.is_floating_point)
    return max(counted, key=lambda d: counted[d]) if counted else None


def meta_clone(module: nn.Module, dtype: torch.dtype | None) -> tuple[nn.Module, dict[int, Tensor]]:
    """A copy of ``module`` that shares no tensor with it: parameters on meta, those of ``dtype`` as bfloat16; buffers copied.

    Raises S0501 where the module cannot be copied.
    """
    memo: dict[int, Any] = {}
    for parameter in module.parameters():
        kind = torch.bfloat16 if parameter.dtype == dtype else parameter.dtype
        memo[id(parameter)] = nn.Parameter(torch.empty_like(parameter, dtype=kind, device="meta"), requires_grad=parameter.requires_grad)
    try:
        clone = copy.deepcopy(module, memo)
    except Exception as error:
        raise fail(
            "S0501", f"{type(module).__name__} cannot be captured: it cannot be copied ({type(error).__name__}: {str(error)[:120]})",
            help="tensors kept outside parameters and buffers must not carry gradients",
        ) from error  # fmt: skip
    return clone, memo


def hoist_plain_tensors(model: nn.Module) -> None:
    """Tensors kept as plain attributes become buffers outside the state dict, so that they move and are named like others."""
    for module in model.modules():
        for key, value in list(module.__dict__.items()):
            if isinstance(value, Tensor) and not key.startswith("_"):
                del module.__dict__[key]
                module.register_buffer(key, value.detach(), persistent=False)


def buffers_to_meta(model: nn.Module, dtype: torch.dtype | None) -> dict[str, Tensor]:
    """Replaces every buffer by a meta twin (``dtype`` becomes bfloat16) and returns the values by full name, each tensor once."""
    values: dict[str, Tensor] = {}
    made: dict[int, tuple[Tensor, Tensor]] = {}
    for path, module in model.named_modules():
        for name, buffer in module._buffers.items():
            if buffer is None:
                continue
            full = f"{path}.{name}" if path else name
            if id(buffer) not in made:
                kind = torch.bfloat16 if buffer.dtype == dtype else buffer.dtype
                made[id(buffer)] = (buffer, torch.empty_like(buffer, dtype=kind, device="meta"))
            values[full] = buffer
            module._buffers[name] = made[id(buffer)][1]
    return values
