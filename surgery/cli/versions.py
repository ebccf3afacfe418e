"""``surgery --version``: the versions that matter, read from package metadata so that nothing heavy is imported."""

from __future__ import annotations

import platform
import sys
from importlib.metadata import PackageNotFoundError, version

from surgery import __version__

PACKAGES = ("torch", "transformers", "safetensors", "numpy", "onnx", "onnxscript", "onnxruntime", "peft", "accelerate")


def versions() -> str:
    """One line a package; those that are not installed are left out."""
    lines = [f"surgery {__version__} (language edition 1)", f"python {platform.python_version()} on {sys.platform}"]
    for name in PACKAGES:
        try:
            lines.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            continue
    return "\n".join(lines) + "\n"
