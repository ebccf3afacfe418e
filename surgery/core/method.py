"""What a method is: one file, one frozen dataclass whose fields are the parameters of the language.

A file ``passes/<verb>/<name>.py`` holds one subclass of :class:`Method`; the verb is the folder, the name is the file.
Discovery imports the folder, so a new method touches its own file and one case file and no list anywhere.
The command line's front end never imports method files: it reads :class:`MethodInfo` records from a generated
catalogue (``surgery/core/catalogue.json``), kept fresh by ``python -m surgery.dev generate --check``.
"""

from __future__ import annotations

import dataclasses
import inspect
import typing
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

REQUIRED: Any = dataclasses.MISSING

FOLD_CLASSES = ("merge", "widen", "gemm", "const", "kvcache", "slice", "none")
KINDS = (
    "delta", "insert", "state", "fold", "mask", "slice", "rotate", "drop", "tie", "route", "replace", "merge", "stack",
    "schedule", "objective", "measure",
)  # fmt: skip


@dataclass(frozen=True)
class ParamInfo:
    """One parameter of a method as the language sees it.

    ``type`` is one of ``int``, ``float``, ``bool``, ``str``, ``name`` (one of ``choices``), ``list``. ``unit`` is the
    dimension a literal must have: ``""`` a plain number or count, ``"%"`` a share in [0, 1], ``"bytes"``, ``"tokens"``.
    ``per_layer`` parameters also take lists, tables and ``ramp(a, b)``. ``default`` is None with ``required`` False for
    optional values. ``also`` holds further types of a ``name`` parameter (``int``, ``list``).
    """

    name: str
    type: str
    help: str
    required: bool = False
    default: Any = None
    min: float | None = None
    max: float | None = None
    unit: str = ""
    choices: tuple[str, ...] = ()
    per_layer: bool = False
    also: tuple[str, ...] = ()


@dataclass(frozen=True)
class MethodInfo:
    """The torch-free record of a method in the catalogue."""

    verb: str
    name: str
    kind: str
    fold: str
    identity: str
    version: int
    places: tuple[str, ...]
    needs_sites: bool
    needs_data: bool
    params: tuple[ParamInfo, ...]
    summary: str
    doc: str
    takes_data: bool = False
    one_of: tuple[str, ...] = ()

    def param(self, name: str) -> ParamInfo | None:
        return next((p for p in self.params if p.name == name), None)


def param(
    default: Any = REQUIRED,
    help: str = "",
    *,
    min: float | None = None,
    max: float | None = None,
    unit: str = "",
    choices: tuple[str, ...] = (),
    per_layer: bool = False,
    last: bool = False,
) -> Any:
    """A dataclass field that is a parameter of the language (see :class:`ParamInfo`). A base class lists those with ``last`` behind
    what its methods add."""
    meta = {"help": help, "min": min, "max": max, "unit": unit, "choices": choices, "per_layer": per_layer, "last": last}
    if default is REQUIRED:
        return field(metadata={"surgery": meta}, kw_only=True)
    return field(default=default, metadata={"surgery": meta}, kw_only=True)


@dataclass(frozen=True)
class Method:
    """Base of every method. Class variables describe it; fields made with :func:`param` are its parameters.

    ``identity`` says whether the model's output is unchanged right after the surgery: ``exact``, ``near`` (then
    ``identity_bound`` holds the stated relative bound) or ``changed``. ``kind`` names the module ``passes/kinds/<kind>.py``
    that owns the graph machinery; the method file holds mathematics only. ``needs_data`` methods cannot do without a ``using``
    clause, ``takes_data`` methods read one for some values of their parameters. ``stands`` says what methods of a kind with several sorts of
    places stand at (inserted modules: ``stream``, ``attention``, ``tokens``). Of the parameters ``one_of``, which say the same thing in
    several ways, a statement gives at most one.
    """

    verb: ClassVar[str] = ""
    name: ClassVar[str] = ""
    kind: ClassVar[str] = ""
    fold_class: ClassVar[str] = "none"
    identity: ClassVar[str] = "exact"
    identity_bound: ClassVar[float] = 0.0
    version: ClassVar[int] = 1
    places: ClassVar[tuple[str, ...]] = ("on",)
    stands: ClassVar[str] = ""
    needs_sites: ClassVar[bool] = True
    needs_data: ClassVar[bool] = False
    takes_data: ClassVar[bool] = False
    one_of: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def info(cls) -> MethodInfo:
        doc = inspect.cleandoc(cls.__doc__ or "")
        return MethodInfo(
            verb=cls.verb, name=cls.name, kind=cls.kind, fold=cls.fold_class, identity=cls.identity,
            version=cls.version, places=cls.places, needs_sites=cls.needs_sites, needs_data=cls.needs_data,
            params=tuple(_param_info(cls, f) for f in _fields(cls)),
            summary=doc.split("\n", 1)[0], doc=doc, takes_data=cls.takes_data or cls.needs_data, one_of=cls.one_of,
        )  # fmt: skip

    def params(self) -> dict[str, Any]:
        """The parameters with their values, as JSON-able data."""
        return {f.name: getattr(self, f.name) for f in _fields(type(self))}


def _fields(cls: type) -> list[dataclasses.Field[Any]]:
    """The fields that are parameters, in the order in which they are shown."""
    return sorted((f for f in dataclasses.fields(cls) if "surgery" in f.metadata), key=lambda f: bool(f.metadata["surgery"].get("last")))


_TYPES: dict[Any, str] = {int: "int", float: "float", bool: "bool", str: "str", tuple: "list", list: "list"}


def _param_info(cls: type, f: dataclasses.Field[Any]) -> ParamInfo:
    meta = f.metadata["surgery"]
    hint = typing.get_type_hints(cls)[f.name]
    args = [a for a in typing.get_args(hint) if a is not type(None)]
    choices = tuple(meta["choices"])
    if typing.get_origin(hint) is Literal:
        choices, kind = tuple(str(a) for a in args), "name"
    else:
        base = args[0] if args and typing.get_origin(hint) not in (list, tuple) else hint
        origin = typing.get_origin(base) or base
        if origin is Literal:
            choices, kind = tuple(str(a) for a in typing.get_args(base)), "name"
        else:
            kind = _TYPES[origin]
    if choices:
        kind = "name"
    also = tuple(_TYPES[typing.get_origin(a) or a] for a in args[1:]) if kind == "name" and typing.get_origin(hint) is not Literal else ()
    required = f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    return ParamInfo(
        name=f.name, type=kind, help=meta["help"], required=required, default=None if required else f.default,
        min=meta["min"], max=meta["max"], unit=meta["unit"], choices=choices, per_layer=meta["per_layer"], also=also,
    )  # fmt: skip
