"""One arm of ``surgery bench`` in a process of its own: runs it twice and prints the peak of the resident memory as JSON.

Reads what to run from the standard input. Files of onnxruntime are run without importing torch, as a server would.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from surgery.benching_arms import ONNX, PLAIN, Options, onnx_arm, open_arms
from surgery.benching_feeds import arrays
from surgery.benching_turns import peak_mib


def run(asked: dict[str, Any]) -> dict[str, float]:
    """``peak``: MiB."""
    if asked["kind"] in (ONNX, PLAIN):
        arm = onnx_arm(asked["source"], ONNX, Path(asked["file"]), int(asked["threads"]), asked["record"])
    else:
        with tempfile.TemporaryDirectory() as folder:
            options = Options(int(asked["threads"]), (asked["kind"],), Path(folder), bool(asked["allow_code"]), bool(asked["use_cache"]))
            (arm,) = open_arms(asked["source"], options)
    call = arm.prepare(arrays(arm.inputs, int(asked["batch"]), int(asked["length"])))
    call()
    call()
    return {"peak": peak_mib()}


if __name__ == "__main__":
    print(json.dumps(run(json.load(sys.stdin))))
