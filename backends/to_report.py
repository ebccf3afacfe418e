"""The report backend: one self-contained HTML page."""

from __future__ import annotations

from surgery.backends.protocol import EmitRequest, Emitted, owns
from surgery.backends.report_page import render
from surgery.backends.report_time import measured
from surgery.model.atomic import AtomicOutput
from surgery.model.program import Program


class ReportBackend:
    """Writes the anatomy before and after, heat maps, the statements, the expectations, the certificates and what was emitted before.

    With ``timings`` it also runs the model before and after, and the ONNX files that the spec emitted so far.
    """

    name = "report"
    folds = False

    def emit(self, program: Program, request: EmitRequest) -> Emitted:
        """Raises S0801 to S0805 for the target."""
        assert request.plan is not None and request.base is not None
        text = request.spec.text if request.spec else ""
        timings = measured(request, program) if request.params.get("timings") else ()
        page = render(
            request.plan, request.base, program, request.certificates, text,
            tensors=request.tensors, outputs=request.earlier, timings=timings,
        )  # fmt: skip
        page = page.replace("<meta charset=utf-8>", f"<meta charset=utf-8><meta name=generator content={request.spec_digest}>", 1)
        with AtomicOutput(request.target, folder=False, force=request.force, own=lambda p: owns(p, request.spec_digest)) as temporary:
            temporary.write_text(page, encoding="utf-8")
        return Emitted((request.target,))


BACKEND = ReportBackend()
