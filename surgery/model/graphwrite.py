"""A graph tree as JSON-able data: the writing half of :mod:`surgery.model.graphjson`, which describes the format."""

from __future__ import annotations

import json
import math
from typing import Any

import torch
from torch import fx, nn

from surgery.core.diagnostics import fail
from surgery.model import modules as registry
from surgery.model import oplist
from surgery.model.exprjson import dump_expr
from surgery.model.graphnames import DTYPES, OPS, SCHEMA, dtype_name, unknown_op


class GraphWriter:
    """Collects the tables of one tree; :func:`surgery.model.graphjson.dump` is the way in."""

    def __init__(self) -> None:
        self.specs: dict[str, int] = {}
        self.spec_data: list[Any] = []
        self.symbols: dict[str, str] = {}
        self.table: dict[str, int] = {}
        self.descriptions: list[Any] = []
        self.schemas: dict[str, str] = {}
        self.templates: dict[str, tuple[frozenset[str], frozenset[str]]] = {}

    def tree(self, root: fx.GraphModule) -> dict[str, Any]:
        top = self.module(root, "")
        first: dict[int, str] = {}
        aliases = []
        for name, tensor in [*root.named_parameters(remove_duplicate=False), *root.named_buffers(remove_duplicate=False)]:
            if first.setdefault(id(tensor), name) != name:
                aliases.append([name, first[id(tensor)]])
        return {
            "schema": SCHEMA, "torch": torch.__version__.split("+")[0], "ops": dict(sorted(self.schemas.items())),
            "symbols": dict(sorted(self.symbols.items())), "specs": self.spec_data, "modules": self.descriptions, "root": top,
            "aliases": aliases,
        }  # fmt: skip

    def module(self, module: nn.Module, path: str) -> int:
        own: frozenset[str] = frozenset()
        if isinstance(module, fx.GraphModule):
            data: dict[str, Any] = {"nodes": [self.node(n, path) for n in module.graph.nodes]} | self.tensors(module)
        elif type(module) in registry.SCOPES:
            data = {} | self.tensors(module)
        else:
            tag, config = registry.config_of(module)
            data = {"tag": tag, "config": config}
            own, made = self.template(tag, config)
            data |= self.leaf_dtypes(module, made) | self.tensors(module, made)
        children = {
            name: self.module(child, f"{path}.{name}" if path else name) for name, child in module.named_children() if name not in own
        }
        if children:
            data["children"] = children
        return self.intern(data)

    def intern(self, data: dict[str, Any]) -> int:
        key = json.dumps(data, sort_keys=False, allow_nan=False)
        if key not in self.table:
            self.table[key] = len(self.descriptions)
            self.descriptions.append(data)
        return self.table[key]

    def template(self, tag: str, config: dict[str, Any]) -> tuple[frozenset[str], frozenset[str]]:
        """Names of the sub-modules and of the tensors that the class makes itself; what else a leaf holds is written out."""
        key = tag + json.dumps(config, sort_keys=True)
        if key not in self.templates:
            built = registry.build(tag, config, None)
            tensors = (*built.named_parameters(remove_duplicate=False), *built.named_buffers(remove_duplicate=False))
            self.templates[key] = frozenset(dict(built.named_children())), frozenset(name for name, _ in tensors)
        return self.templates[key]

    def leaf_dtypes(self, module: nn.Module, made: frozenset[str]) -> dict[str, Any]:
        tensors = [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
        found = {name: dtype_name(t.dtype) for name, t in tensors if name in made}
        main = next((d for d in found.values() if DTYPES[d].is_floating_point), None)
        data: dict[str, Any] = {} if main is None else {"dtype": main}
        others = {name: d for name, d in found.items() if d != main}
        return data | ({"dtypes": others} if others else {})

    def tensors(self, module: nn.Module, made: frozenset[str] = frozenset()) -> dict[str, Any]:
        own = [[n, dtype_name(p.dtype), list(p.shape)] for n, p in module._parameters.items() if p is not None and n not in made]
        held = [
            [n, dtype_name(b.dtype), list(b.shape), n not in module._non_persistent_buffers_set]
            for n, b in module._buffers.items()
            if b is not None and n not in made
        ]
        return ({"parameters": own} if own else {}) | ({"buffers": held} if held else {})

    def node(self, node: fx.Node, path: str) -> list[Any]:
        target = str(node.target)
        if node.op == "call_function":
            name = oplist.target_name(node.target)
            if name is None:
                raise unknown_op(_describe(node.target), f"node {node.name} of {path or 'the model'}")
            target = name
            if isinstance(node.target, torch._ops.OpOverload):
                self.schemas[name] = oplist.schema(node.target)
        elif node.op not in OPS:
            raise fail(
                "S0830",
                f"node {node.name} of {path or 'the model'} is a {node.op}, which has no stored form",
                help="capture the model again",
            )
        where = f"node {node.name} of {path or 'the model'}"
        args = [self.arg(a, where) for a in node.args]
        kwargs = {k: self.arg(v, where) for k, v in node.kwargs.items()}
        data: list[Any] = [node.name, OPS[node.op], target, args, kwargs, self.spec(node.meta.get("spec"), where)]
        scope = node.meta.get("scope")
        return [*data, scope] if isinstance(scope, str) else data

    def arg(self, value: Any, where: str) -> Any:
        if value is None or isinstance(value, (bool, str)):
            return value
        if isinstance(value, fx.Node):
            return {"n": value.name}
        if isinstance(value, int):
            return int(value)
        if isinstance(value, float):
            return value if math.isfinite(value) else {"float": repr(value)}
        if isinstance(value, tuple):
            return {"t": [self.arg(v, where) for v in value]}
        if isinstance(value, list):
            return [self.arg(v, where) for v in value]
        if isinstance(value, slice):
            return {"slice": [self.arg(v, where) for v in (value.start, value.stop, value.step)]}
        if isinstance(value, torch.dtype):
            return {"dtype": dtype_name(value)}
        if isinstance(value, torch.device):
            return {"device": str(value)}
        if isinstance(value, torch.memory_format):
            return {"format": str(value).removeprefix("torch.")}
        if isinstance(value, torch.layout) and value is torch.strided:
            return {"layout": "strided"}
        if isinstance(value, dict) and all(isinstance(k, str) for k in value):
            return {"d": [[k, self.arg(v, where)] for k, v in value.items()]}
        raise fail(
            "S0830", f"{where} has an argument of type {type(value).__name__} that has no stored form", help="capture the model again"
        )

    def spec(self, spec: Any, where: str) -> int | None:
        if spec is None:
            return None
        if isinstance(spec, (tuple, list)):
            data: Any = [self.spec(s, where) for s in spec]
        else:
            try:
                data = {"k": spec.kind, "d": spec.dtype, "s": [dump_expr(s, self.symbols) for s in spec.shape]}
            except ValueError as err:
                raise fail("S0830", f"{where} has a size that has no stored form: {err}", help="capture the model again") from None
        key = json.dumps(data)
        if key not in self.specs:
            self.specs[key] = len(self.spec_data)
            self.spec_data.append(data)
        return self.specs[key]


def _describe(target: Any) -> str:
    return (
        str(target)
        if isinstance(target, torch._ops.OpOverload)
        else f"{getattr(target, '__module__', '?')}.{getattr(target, '__name__', target)}"
    )
