"""Discovery of methods: every module of every verb's folder is imported, each must hold exactly one method."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import pkgutil
import sys
from collections.abc import Callable
from functools import cache, partial
from typing import Any

from surgery.core.method import FOLD_CLASSES, KINDS, Method, MethodInfo


@cache
def methods() -> dict[tuple[str, str], type[Method]]:
    """All methods by (verb, name), sorted. Raises RuntimeError for a file that breaks the contract: that is a fault of ours."""
    import surgery.passes

    found: dict[tuple[str, str], type[Method]] = {}
    for folder in pkgutil.iter_modules(surgery.passes.__path__):
        if not folder.ispkg or folder.name == "kinds":
            continue
        package = importlib.import_module(f"surgery.passes.{folder.name}")
        for entry in pkgutil.iter_modules(package.__path__):
            if entry.name.startswith("_"):
                continue
            module = importlib.import_module(f"{package.__name__}.{entry.name}")
            found[folder.name, entry.name.rstrip("_")] = _method_of(module, folder.name, entry.name.rstrip("_"))
    return dict(sorted(found.items()))


def _method_of(module: object, verb: str, name: str) -> type[Method]:
    where = getattr(module, "__name__", "?")
    own = [
        c for c in vars(module).values()
        if inspect.isclass(c) and issubclass(c, Method) and c.__module__ == where and not c.__name__.startswith("_")
    ]  # fmt: skip
    if len(own) != 1:
        raise RuntimeError(f"{where} must define exactly one public Method, it defines {[c.__name__ for c in own]}")
    cls = own[0]
    if not dataclasses.is_dataclass(cls):
        raise RuntimeError(f"{where}.{cls.__name__} must be a frozen dataclass")
    cls.verb, cls.name = verb, name
    if cls.kind not in KINDS or cls.fold_class not in FOLD_CLASSES:
        raise RuntimeError(f"{where}.{cls.__name__} has kind {cls.kind!r} and fold class {cls.fold_class!r}: see surgery.core.method")
    if not (cls.__doc__ or "").strip():
        raise RuntimeError(f"{where}.{cls.__name__} needs a docstring: it is the method's documentation page")
    return cls


def get(verb: str, name: str) -> type[Method]:
    """The method class; KeyError when there is none."""
    return methods()[verb, name]


def catalogue() -> list[MethodInfo]:
    return [cls.info() for cls in methods().values()]


@cache
def function(reference: str) -> Callable[..., Any]:
    """The function behind ``verb/name:function`` of an ``Apply`` expression.

    A function of the method's own file comes first; otherwise the one of that name in the file of a base class or in its kind, with the
    method class bound in front. KeyError when there is none.
    """
    path, _, name = reference.partition(":")
    verb, _, method = path.partition("/")
    if verb == "kinds":  # of no method: `kinds/module:function`
        found = getattr(importlib.import_module(f"surgery.passes.kinds.{method}"), name, None)
        if not inspect.isfunction(found) or found.__module__ != f"surgery.passes.kinds.{method}":
            raise KeyError(reference)
        return found
    cls = get(verb, method)
    own = getattr(sys.modules[cls.__module__], name, None)
    if inspect.isfunction(own) and own.__module__ == cls.__module__:
        return own
    kind = importlib.import_module(f"surgery.passes.kinds.{cls.kind}")
    bases = [sys.modules[base.__module__] for base in cls.__mro__[1:] if base.__module__.startswith("surgery.passes.kinds.")]
    for module in (*bases, kind):
        shared = getattr(module, name, None)
        if inspect.isfunction(shared) and shared.__module__ == module.__name__:
            return partial(shared, cls)
    raise KeyError(reference)
