"""Model surgery: a compiler from a short text to a changed neural network.

::

    import surgery

    surgery.check(text)                            findings of a spec, without a model and without torch
    surgery.plan("shrink.surg", "checkpoint")      everything that would happen
    surgery.compile("shrink.surg", "checkpoint")   do it: .module, .artifacts, .plan, .certificates
    surgery.load("build/small")                    an emitted artifact as an nn.Module

Names are imported when they are first used, so that ``import surgery`` costs nothing and ``surgery.check`` needs no torch.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from surgery.core.version import VERSION

__version__ = VERSION

if TYPE_CHECKING:
    from surgery import train as train
    from surgery.core.diagnostics import Diagnostic as Diagnostic
    from surgery.core.diagnostics import SurgeryError as SurgeryError
    from surgery.core.method import Method as Method
    from surgery.core.method import param as param
    from surgery.core.plan import Plan as Plan
    from surgery.driver import Result as Result
    from surgery.driver import compile_spec as compile  # noqa: F401
    from surgery.driver import load as load
    from surgery.driver import plan as plan
    from surgery.driver import save as save
    from surgery.opening import capture as capture
    from surgery.swapping import adapter_inputs as adapter_inputs

_LAZY: dict[str, tuple[str, str]] = {
    "plan": ("surgery.driver", "plan"),
    "compile": ("surgery.driver", "compile_spec"),
    "load": ("surgery.driver", "load"),
    "save": ("surgery.driver", "save"),
    "adapter_inputs": ("surgery.swapping", "adapter_inputs"),
    "capture": ("surgery.opening", "capture"),
    "Result": ("surgery.driver", "Result"),
    "Plan": ("surgery.core.plan", "Plan"),
    "Method": ("surgery.core.method", "Method"),
    "param": ("surgery.core.method", "param"),
    "Diagnostic": ("surgery.core.diagnostics", "Diagnostic"),
    "SurgeryError": ("surgery.core.diagnostics", "SurgeryError"),
    "train": ("surgery.train", ""),
}

__all__ = ["check", "__version__", *_LAZY]


def check(text: str, path: str | None = None, *, set: Mapping[str, str] | None = None) -> list[Diagnostic]:
    """Every finding of a spec given as text: syntax, names, parameters, units, order. Needs no model and no torch.

    ``path`` is the name that the findings show and that imports are relative to. ``set`` gives parameters other values, as text
    like on the command line. An import that cannot be read is a finding; nothing is raised for what a spec can get wrong.
    """
    # by name: a static import here would make every module that reads the version depend on the front end
    front = importlib.import_module("surgery.front")
    source = importlib.import_module("surgery.core.source")
    found: list[Diagnostic] = front.check_source(source.Source(path or "<text>", text), set)[1]
    return found


def __getattr__(name: str) -> Any:
    try:
        module, attribute = _LAZY[name]
    except KeyError:
        raise AttributeError(f"module 'surgery' has no attribute {name!r}") from None
    found: Any = importlib.import_module(module)
    value = getattr(found, attribute) if attribute else found
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
