"""The promise that experts compute at the start what the dense block computed."""

from __future__ import annotations

from surgery.core.source import Span
from surgery.model.claims import Claim
from surgery.model.program import Program
from surgery.model.running import outputs_of


def same_as_dense(before: Program, after: Program, span: Span) -> Claim:
    """The outputs of the whole model before and after the conversion, in float32."""
    return Claim("experts = dense at init", after, outputs_of(before), outputs_of(after), 1e-5, span)
