"""Statements of which every selector is marked ``?`` and matches nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING

from surgery.core import ast
from surgery.core.plan import PlanStep
from surgery.core.printer import to_text
from surgery.core.spec import Checked

if TYPE_CHECKING:
    from surgery.session import Session

NOTHING = "nothing is done: the model has nothing of what its selectors, all marked `?`, name"


def idle(session: Session, checked: Checked, position: int) -> None:
    """Puts such a statement into the plan. It does nothing, and must not mean the whole model, as one without selectors may."""
    node, call = checked.node, checked.call
    assert isinstance(node, ast.Operation | ast.Merge | ast.Train) and call is not None
    verb = node.verb if isinstance(node, ast.Operation) else "merge" if isinstance(node, ast.Merge) else "train"
    params = {k: v for k, v in call.values().items() if v is None or isinstance(v, bool | int | float | str)}
    session.resolved[f"{position}: {verb} {call.name}"] = []
    session.plan.steps.append(
        PlanStep(
            span=node.span,
            verb=verb,
            method=call.name,
            params=params,
            text=to_text(node),
            doc=node.doc,
            stage=checked.stage,
            facts=(NOTHING,),
        )
    )
