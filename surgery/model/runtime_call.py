"""From the arguments of a call to the flat tensors that a captured graph takes, and back to the original output classes.

Inputs that a caller leaves out get what the live model would use: masks of ones, types of zeros, positions that go on after the
cache, an empty cache. What the graph was not captured with is refused with S0831 rather than ignored.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from surgery.core.diagnostics import SurgeryError, fail
from surgery.model import pytree
from surgery.model.program import Signature

IDENTITY = ("input_ids", "pixel_values", "input_features", "input_values", "inputs_embeds")
SWITCHES = ("output_attentions", "output_hidden_states", "output_router_logits", "interpolate_pos_encoding", "bool_masked_pos", "head_mask")


class Call:
    """How one captured graph is called: its parameters with their trees, and the shapes of its flat inputs."""

    def __init__(self, signature: Signature, graph: fx.Graph) -> None:
        self.signature = signature
        self.parameters = signature.parameters
        tree = signature.in_spec
        keys = tree.get("keys") or list(range(len(tree.get("items", ()))))
        items = tree.get("items", [])
        if len(items) != len(self.parameters):
            raise fail(
                "S0826",
                "the stored signature is damaged: it has other inputs than parameters",
                help="emit the artifact again from its spec",
            )
        self.trees: dict[str, pytree.Tree] = {
            (key if isinstance(key, str) else self.parameters[key]): item for key, item in zip(keys, items, strict=True)
        }
        specs = [node.meta.get("spec") for node in graph.nodes if node.op == "placeholder"]
        self.shapes: dict[str, list[tuple[Any, ...]]] = {}
        at = 0
        for name, item in self.trees.items():
            count = pytree.leaves_in(item)
            self.shapes[name] = [tuple(s.shape) if s is not None else () for s in specs[at : at + count]]
            at += count
        if at != len(specs):
            raise fail(
                "S0826",
                f"the stored graph is damaged: it takes {len(specs)} tensors, its signature {at}",
                help="emit the artifact again from its spec",
            )
        self.cache = next((n for n, item in self.trees.items() if item["type"] == "cache"), None)
        self.out = signature.out_spec
        self.classes = {name: pytree.output_class(name) for name in _classes(self.out)}

    # --- in ---------------------------------------------------------------------------------------------------------

    def arguments(
        self, args: Sequence[Any], kwargs: Mapping[str, Any], name: str, extras: Sequence[str] = ()
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """(captured inputs by name, other accepted keywords). Raises S0831 for what the capture does not have."""
        if len(args) > len(self.parameters):
            raise fail(
                "S0831",
                f"{name} takes {len(self.parameters)} positional inputs, {len(args)} were given",
                help="its inputs are " + ", ".join(self.parameters),
            )
        given = dict(zip(self.parameters, args, strict=False))
        other: dict[str, Any] = {}
        for key, value in kwargs.items():
            if key in given:
                raise fail("S0831", f"{name} got the input {key} twice", help="pass it by position or by keyword")
            if key in self.trees:
                given[key] = value
            elif key in extras:
                other[key] = value
            elif key in self.signature.constants and value == self.signature.constants[key]:
                continue
            elif value is not None and value is not False and not (type(value) is int and value == 0):
                raise self.unsupported(key, name)
        return given, other

    def unsupported(self, key: str, name: str) -> SurgeryError:
        return fail(
            "S0831", f"{name} was captured without {key}", notes=("it takes " + ", ".join(self.parameters),),
            help="run the original model for this output" if key in SWITCHES else "capture the model again with this input to use it",
        )  # fmt: skip

    def flat(self, given: dict[str, Any], dtype: torch.dtype, device: torch.device, *, position: Any = None) -> list[Tensor]:
        """The graph's inputs in order; missing ones are made."""
        past = self.past_length(given.get(self.cache)) if self.cache else 0
        flat: list[Tensor] = []
        for name, tree in self.trees.items():
            value = given.get(name)
            kind = tree["type"]
            if kind == "cache":
                flat += self.cache_tensors(value, name, given, dtype, device)
            elif kind == "tensor" and value is None:
                flat.append(self.default(name, given, past, device))
            elif kind == "const":
                if value is not None:
                    pytree.flatten(value, tree, name)
            else:
                flat += pytree.flatten(value, tree, name)
        return flat

    def source(self, name: str, given: Mapping[str, Any]) -> Tensor:
        """The tensor whose batch and length a missing input follows."""
        prefix = "decoder_" if name.startswith("decoder_") or (self.cache == name and "decoder_input_ids" in self.trees) else ""
        for candidate in (*(prefix + n for n in IDENTITY), *self.parameters):
            value = given.get(candidate)
            if isinstance(value, Tensor) and value.ndim:
                return value
        raise fail(
            "S0831",
            f"the call gives no {' or '.join(n for n in self.parameters if n in IDENTITY) or 'input'}",
            help="pass at least the main input",
        )

    def default(self, name: str, given: Mapping[str, Any], past: int, device: torch.device) -> Tensor:
        bare = name.removeprefix("decoder_")
        if bare not in ("attention_mask", "token_type_ids", "position_ids", "pixel_mask"):
            raise fail(
                "S0831", f"the input {name} is missing", help="the module was captured with it: pass it, as " + ", ".join(self.parameters)
            )
        source = self.source(name, given)
        batch, length = source.shape[0], source.shape[1] if source.ndim > 1 else 1
        if bare == "attention_mask":
            return torch.ones(batch, past + length, dtype=torch.long, device=source.device)
        if bare == "pixel_mask":
            return torch.ones(batch, *source.shape[-2:], dtype=torch.long, device=source.device)
        if bare == "token_type_ids":
            return torch.zeros(batch, length, dtype=torch.long, device=source.device)
        rows = self.shapes[name][0][:1]
        places = torch.arange(past, past + length, device=source.device).unsqueeze(0)
        return places if rows == (1,) else places.expand(batch, length)

    # --- cache --------------------------------------------------------------------------------------------------------

    @staticmethod
    def past_length(cache: Any) -> int:
        return int(cache.get_seq_length()) if cache is not None else 0

    def cache_tensors(self, cache: Any, name: str, given: Mapping[str, Any], dtype: torch.dtype, device: torch.device) -> list[Tensor]:
        """Keys and values of all layers, in the tree's order; layers that hold nothing yet give tensors of length 0."""
        tree = self.trees[name]
        parts = [None] * (2 if tree["class"] == "EncoderDecoderCache" else 1) if cache is None else self.parts(cache, name)
        batch = self.source(name, given).shape[0]
        shapes = iter(self.shapes[name])
        flat: list[Tensor] = []
        for part in parts:
            for what in ("keys", "values"):
                for i in range(tree["layers"]):
                    shape = next(shapes)
                    held = part.layers[i] if part is not None and i < len(part.layers) else None
                    tensor = getattr(held, what, None) if getattr(held, "is_initialized", False) else None
                    if tensor is None or tensor.numel() == 0:
                        tensor = torch.zeros(batch, int(shape[1]), 0, int(shape[3]), dtype=dtype, device=device)
                    flat.append(tensor)
        return flat

    def parts(self, cache: Any, name: str) -> list[Any]:
        from transformers.cache_utils import DynamicLayer

        want = self.trees[name]["class"]
        if not any(cls.__name__ == want for cls in type(cache).__mro__):
            raise fail(
                "S0831", f"{name} must be a {want}, it is a {type(cache).__name__}", help=f"pass transformers.{want}() or leave it out"
            )
        parts = [cache] if want == "DynamicCache" else [cache.self_attention_cache, cache.cross_attention_cache]
        if any(type(layer) is not DynamicLayer for part in parts for layer in part.layers):
            raise fail(
                "S0831", f"{name} has layers that forget or are fixed in size", help="pass transformers.DynamicCache() without a config"
            )
        return parts

    # --- out ----------------------------------------------------------------------------------------------------------

    def result(self, leaves: Sequence[Any], cache: Any = None, *, keep_cache: bool = True) -> Any:
        """The original output. ``cache``, when given, is filled in place and returned in the output, as the live model does."""
        return self._result(iter(leaves), self.out, cache, keep_cache)

    def _result(self, stream: Any, tree: pytree.Tree, cache: Any, keep: bool) -> Any:
        kind = tree["type"]
        if kind == "cache":
            if cache is None:
                built = pytree.unflatten(stream, tree)
                return built if keep else None
            for part in self.parts(cache, self.cache or "past_key_values"):
                keys = [next(stream) for _ in range(tree["layers"])]
                values = [next(stream) for _ in range(tree["layers"])]
                pytree.fill_cache(part, keys, values)
            return cache if keep else None
        if kind in ("dict", "output"):
            named = {k: self._result(stream, item, cache, keep) for k, item in zip(tree["keys"], tree["items"], strict=True)}
            return named if kind == "dict" else self.classes[tree["class"]](**named)
        if kind in ("list", "tuple"):
            items = [self._result(stream, item, cache, keep) for item in tree["items"]]
            return items if kind == "list" else tuple(items)
        return next(stream) if kind == "tensor" else tree["value"]


def _classes(tree: pytree.Tree) -> set[str]:
    own = {tree["class"]} if tree["type"] == "output" else set()
    return own.union(*(_classes(item) for item in tree.get("items", ())))
