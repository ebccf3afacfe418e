"""Discovery of methods: every module of a verb's folder is one, and must hold exactly one; a file is imported when its method is asked for."""

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
    return dict(sorted(((verb, name), cls) for verb in _verbs() for name, cls in of(verb).items()))


def of(verb: str) -> dict[str, type[Method]]:
    """The methods of one verb by name; the files of other verbs are not imported."""
    return {name: get(verb, name) for name in sorted(_files(verb))}


@cache
def _verbs() -> tuple[str, ...]:
    import surgery.passes

    return tuple(f.name for f in pkgutil.iter_modules(surgery.passes.__path__) if f.ispkg and f.name != "kinds")


@cache
def _files(verb: str) -> dict[str, str]:
    """Module names of a verb's methods by the names in the language; a Python keyword has an underscore behind it."""
    if verb not in _verbs():
        return {}
    package = importlib.import_module(f"surgery.passes.{verb}")
    found = [entry.name for entry in pkgutil.iter_modules(package.__path__) if not entry.name.startswith("_")]
    return {name.rstrip("_"): f"{package.__name__}.{name}" for name in found}


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


@cache
def get(verb: str, name: str) -> type[Method]:
    """The method class; only its own file is imported. KeyError when there is none.

    Without a verb ``name`` is the tag of a module that a method attached, in an artifact that may be all that this process has seen:
    what registers its class is imported, and there is no method.
    """
    if not verb:
        _register(name)
    file = _files(verb).get(name) if verb else None
    if file is None:
        raise KeyError((verb, name))
    return _method_of(importlib.import_module(file), verb, name)


def _register(tag: str) -> None:
    """Import the files of kinds, those called like the tag first, until one has registered the class of modules with this tag."""
    import surgery.passes.kinds
    from surgery.model.modules import registered

    word = tag.rpartition(".")[2]
    names = [f.name for f in pkgutil.iter_modules(surgery.passes.kinds.__path__)]
    for name in sorted(names, key=lambda n: (word not in n, n)):
        if registered(tag):
            return
        importlib.import_module(f"surgery.passes.kinds.{name}")


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
