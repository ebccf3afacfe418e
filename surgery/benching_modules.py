"""Arms of what torch runs: artifacts of ``emit torch`` and models, as they are, through torch.compile, and as a plain ONNX export."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from surgery.backends import served
from surgery.benching_arms import COMPILE, EAGER, PLAIN, Arm, Options, onnx_arm, tensor
from surgery.benching_feeds import Arrays, from_record
from surgery.core.progress import report
from surgery.model.live import Tensors, live_root
from surgery.model.program import Program
from surgery.opening import open_program
from surgery.passes import registry


def module_arms(ref: str, options: Options) -> list[Arm]:
    """The arms of an artifact or model that ``options.extra`` names. All run in fp32, so that times and outputs compare."""
    torch.set_num_threads(options.threads)
    program, checkpoint = open_program(ref, allow_code=options.allow_code, use_cache=options.use_cache)
    record = served.record(program, _names(program))
    arms: list[Arm] = []
    if EAGER in options.extra or COMPILE in options.extra:
        module = eager(ref, program, checkpoint)
        if EAGER in options.extra:
            arms.append(_torch_arm(ref, EAGER, module, program, record))
        if COMPILE in options.extra:
            arms.append(_torch_arm(ref, COMPILE, torch.compile(module, dynamic=False), program, record))
    if PLAIN in options.extra:
        arms.append(plain_arm(ref, program, record, options))
    return arms


def eager(ref: str, program: Program, checkpoint: Any) -> nn.Module:
    """The module in evaluation mode: of an artifact what ``surgery.load`` gives, of a checkpoint transformers' own class, else the captured module."""
    kind = getattr(checkpoint, "kind", "")
    module: nn.Module
    if kind == "artifact":
        from surgery.driver import load

        module = load(checkpoint.path, dtype=torch.float32)
    elif kind == "python":
        module = checkpoint.module
    elif kind in ("transformers", "minilm") and checkpoint.path is not None:
        module = _original(checkpoint)
    else:
        from surgery.model.runtime import build_module

        module = build_module(program, Tensors(registry.function).all(program), dtype=torch.float32)
    return module.float().eval().requires_grad_(False)


def _original(checkpoint: Any) -> nn.Module:
    import transformers
    from transformers.utils import logging

    cls = getattr(transformers, checkpoint.architecture)
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        made: nn.Module = cls.from_pretrained(str(checkpoint.path), dtype=torch.float32)
        return made
    finally:
        if shown:
            logging.enable_progress_bar()


def _torch_arm(ref: str, kind: str, module: Any, program: Program, record: dict[str, Any]) -> Arm:
    inputs = tuple(from_record(record))
    tree, out = served.input_tree(program), program.signature.out_spec
    names = record["outputs"]
    cached = {k: item for k, item in zip(tree["keys"], tree["items"], strict=True) if item["type"] == "cache"}

    def prepare(feeds: Arrays) -> Callable[[], Arrays]:
        flat = [tensor(feeds[i.name], torch.float32) for i in inputs]
        given = served.nest(iter(flat), tree)

        def call() -> Arrays:
            made = {k: live_cache(given[k], item) for k, item in cached.items()}
            with torch.inference_mode():
                found = module(**{**given, **made}, **({"use_cache": True} if cached else {}))
            return dict(zip(names, leaves(found, out), strict=True))

        return call

    return Arm(ref, kind, inputs, prepare, record)


def live_cache(layers: Any, tree: Any) -> Any:
    """A transformers cache of the layers' tensors; the module fills it, so that every call needs one of its own."""
    from transformers import DynamicCache, EncoderDecoderCache

    def one(columns: tuple[int, int]) -> Any:
        cache = DynamicCache()
        for at, layer in enumerate(layers):
            if layer[columns[0]].shape[-2]:
                cache.update(layer[columns[0]], layer[columns[1]], at)
        return cache

    return EncoderDecoderCache(one((0, 1)), one((2, 3))) if tree["class"] == "EncoderDecoderCache" else one((0, 1))


def leaves(value: Any, tree: Any) -> list[Any]:
    """The tensors of a module's output in the order of the captured tree."""
    kind = tree["type"]
    if kind == "tensor":
        return [value]
    if kind == "const":
        return []
    if kind == "cache":
        parts = [value.self_attention_cache, value.cross_attention_cache] if tree["class"] == "EncoderDecoderCache" else [value]
        return [getattr(layer, what) for part in parts for what in ("keys", "values") for layer in part.layers[: tree["layers"]]]
    items = tree["items"]
    held = [value[k] for k in tree["keys"]] if kind in ("dict", "output") else list(value)
    return [leaf for v, item in zip(held, items, strict=True) for leaf in leaves(v, item)]


def plain_arm(ref: str, program: Program, record: dict[str, Any], options: Options) -> Arm:
    """The model exported by torch's exporter with nothing folded and nothing fused."""
    from surgery.backends.onnx_export import export
    from surgery.backends.to_onnx import require_onnx

    require_onnx()
    report(f"exporting {ref} without fusion")
    root = live_root(program, Tensors(registry.function), dtype=torch.float32).eval()
    model = export(program, root, opset=20)
    path = options.place / f"plain-{len(list(options.place.glob('plain-*.onnx')))}.onnx"
    save(model, path)
    return onnx_arm(ref, PLAIN, path, options.threads, record)


def save(model: Any, path: Path) -> None:
    import onnx

    large = sum(len(i.raw_data) for i in model.graph.initializer) > 1 << 30
    onnx.save_model(model, str(path), save_as_external_data=large, location=f"{path.name}.data")


def _names(program: Program) -> list[str]:
    from surgery.backends.onnx_export import output_names

    found = next(n for n in program.graph.graph.nodes if n.op == "output").args[0]
    return output_names(program, len(found) if isinstance(found, (tuple, list)) else 1)


def as_array(value: Any) -> np.ndarray:
    """An output as float64, for comparing."""
    if isinstance(value, torch.Tensor):
        return value.detach().double().cpu().numpy()
    return np.asarray(value, dtype=np.float64)
