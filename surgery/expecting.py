"""What `expect` asks of a quantity: the measured value beside its limit, and the message when it is missed."""

from __future__ import annotations

from decimal import Decimal
from typing import TYPE_CHECKING, Any

from surgery.core import ast
from surgery.core.diagnostics import Severity, error
from surgery.core.plan import Expectation
from surgery.core.printer import to_text
from surgery.passes.expect import COMPARE, Quantity, measure

if TYPE_CHECKING:
    from surgery.session import Session


def judge(session: Session, node: ast.ExpectQuantity, found: Quantity) -> Expectation:
    """Compares a measured quantity with its limit; a share is taken of the model as it is here, or of the base."""
    assert isinstance(node.value, ast.Number) and found.value is not None
    limit = float(node.value.value)
    detail = found.arithmetic
    value = float(found.value)
    if node.value.unit == "%" and node.quantity != "sparsity":
        whole, name = _whole(session, node)
        share = value / whole if whole else 0.0
        # in decimals, so that 110% of 32,032 is 35,235.2 and a count that just reaches its share compares as equal
        of = float(Decimal(str(node.value.value)) * Decimal(str(whole)))
        detail += f"; {100 * share:.4g}% of {whole:,.0f} {name}, limit {100 * limit:g}% = {of:,.1f}"
        limit = of
    elif node.quantity == "sparsity":
        detail += f"; {100 * value:.6g}% against {100 * limit:g}%"
    ok = COMPARE[node.compare](value, limit)
    return Expectation(to_text(node).removeprefix("expect "), ok, value, limit, detail, node.span)


def _whole(session: Session, node: ast.ExpectQuantity) -> tuple[float, str]:
    """What a percentage is a share of: the same quantity of the whole model, except that trainable and active parameters
    are shares of all parameters."""
    quantity = "params" if node.quantity in ("trainable", "active_params") else node.quantity
    if node.of_base:
        assert session.base is not None
        return float(measure(session.base, quantity).value or 0), f"{quantity} of the base"
    return float(measure(session.program, quantity).value or 0), f"{quantity}"


def failed(result: Expectation, node: ast.ExpectQuantity) -> Any:
    assert isinstance(node.value, ast.Number)
    help = "change the operations above, or the limit if it is wrong"
    if node.value.unit == "%" and not node.of_base and not node.selectors and not node.of and node.quantity in ("params", "bytes", "flops"):
        help = f"this is a share of the model as it is here, of itself: write `{result.text} of base` for one of the model before the first line"
    return error(
        "S0601", f"expected {result.text}", node.span, f"{_figure(result.value)} is not {node.compare} {_figure(result.limit)}",
        notes=(result.detail,), help=help, severity=Severity.ERROR,
    )  # fmt: skip


def _figure(value: float | None) -> str:
    if value is None:
        return "?"
    return f"{int(value):,}" if float(value).is_integer() else f"{value:,.4g}"
