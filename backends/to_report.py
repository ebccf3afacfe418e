"""The report backend: one self-contained HTML page."""

from __future__ import annotations

from surgery.backends.protocol import EmitRequest, Emitted, owns
from surgery.backends.report_page import render
from surgery.model.atomic import AtomicOutput
from surgery.model.program import Program


class ReportBackend:
    """Writes the anatomy before and after, the statements, the expectations and the certificates."""

    name = "report"
    folds = False

    def emit(self, program: Program, request: EmitRequest) -> Emitted:
        """Raises S0801 to S0805 for the target."""
        assert request.plan is not None and request.base is not None
        text = request.spec.text if request.spec else ""
        page = render(request.plan, request.base, program, request.certificates, text)
        page = page.replace("<meta charset=utf-8>", f"<meta charset=utf-8><meta name=generator content={request.spec_digest}>", 1)
        with AtomicOutput(request.target, folder=False, force=request.force, own=lambda p: owns(p, request.spec_digest)) as temporary:
            temporary.write_text(page, encoding="utf-8")
        return Emitted((request.target,))


BACKEND = ReportBackend()
