"""Operators of the domain ``com.microsoft`` for torch's exporter, which knows no schema of theirs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

DOMAIN = "com.microsoft"

FLOATS = ("tensor(float)", "tensor(float16)", "tensor(bfloat16)", "tensor(double)")
INTEGERS = ("tensor(int32)", "tensor(int64)")


def operator(name: str, inputs: Sequence[str], outputs: Sequence[str], attributes: Mapping[str, str]) -> Any:
    """A callable that adds a node of this operator while the exporter traces a translation.

    ``inputs`` and ``outputs`` are ``name`` or ``name:M`` for an integer tensor, with ``?`` behind an optional one; ``attributes`` maps names
    to ``int``, ``float``, ``ints`` or ``string``.
    """
    return _operator(name, tuple(inputs), tuple(outputs), tuple(sorted(attributes.items())))


@cache
def _operator(name: str, inputs: tuple[str, ...], outputs: tuple[str, ...], attributes: tuple[tuple[str, str], ...]) -> Any:
    from onnx.defs import OpSchema
    from onnxscript import values

    option = OpSchema.FormalParameterOption

    def formal(text: str) -> Any:
        plain = text.rstrip("?")
        label, _, kind = plain.partition(":")
        chosen = option.Optional if text.endswith("?") else option.Single
        return OpSchema.FormalParameter(label, kind or "T", param_option=chosen)

    kinds = {
        "int": OpSchema.AttrType.INT,
        "float": OpSchema.AttrType.FLOAT,
        "ints": OpSchema.AttrType.INTS,
        "string": OpSchema.AttrType.STRING,
    }
    used = {"T"} | {t.rstrip("?").partition(":")[2] or "T" for t in (*inputs, *outputs)}
    constraints = [("T", list(FLOATS), "")] + ([("M", list(INTEGERS), "")] if "M" in used else [])
    schema = OpSchema(
        name, DOMAIN, 1, "",
        inputs=[formal(t) for t in inputs], outputs=[formal(t) for t in outputs], type_constraints=constraints,
        attributes=[OpSchema.Attribute(label, kinds[kind], "", required=False) for label, kind in attributes],
    )  # fmt: skip
    return values.Op(values.Opset(DOMAIN, 1), name, schema)
