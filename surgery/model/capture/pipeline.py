"""From a config or a module to a :class:`Captured`."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from surgery.core.diagnostics import SurgeryError, fail
from surgery.model.capture import build, dropouts, flatten, modes
from surgery.model.capture.errors import Fallback
from surgery.model.capture.flatcall import Axes, Call, Trace, cache_names, flat_names, trace
from surgery.model.capture.inputs import hf_call, note_of_cache
from surgery.model.capture.normalise import Normaliser, draws
from surgery.model.capture.numbers import fold_scalars
from surgery.model.capture.template import Cutter
from surgery.model.capture.tree import Tensors, stand_up
from surgery.model.graphnames import is_word
from surgery.model.program import Signature


@dataclass
class Captured:
    """A model as a graph, without weights.

    ``graph``: tree of GraphModules on meta tensors, the model's own dtype written as bfloat16. ``aliases``: further name of a
    tied tensor -> its first name. ``constants``: values of lifted constants and of buffers outside the state dict, by full
    name. ``parameters``: every state-dict name -> (shape, dtype as captured). ``fallback``: why the layers were traced one by
    one, "" when twins were stamped. ``notes``: what the live model draws in training outside any graph, so that this one does not.
    """

    graph: fx.GraphModule
    signature: Signature
    aliases: dict[str, str]
    constants: dict[str, Tensor]
    parameters: dict[str, tuple[tuple[int, ...], str]]
    fallback: str = ""
    notes: tuple[str, ...] = ()


def capture_config(config: Any, architecture: str | None = None, *, cache_dir: Path | None = None) -> Captured:
    """The graph of a transformers model from its config (or a plain dict with ``model_type``), without weights.

    ``architecture``: model class name, default the config's own. ``cache_dir``: folder of earlier captures, or None.
    Raises SurgeryError: S0501-S0503 (cannot be traced), S0504 (unknown family, class or unfit sizes), S0505 (inputs unknown).
    """
    if cache_dir is not None:
        from surgery.model.capture.cache import cached

        # a stored capture needs neither config class nor model class: importing them costs more than reading the capture
        return cached(config, architecture or "", cache_dir, lambda: capture_config(config, architecture))
    own = build.as_config(config)
    return _capture_hf(own, build.model_class(own, architecture))


def _capture_hf(config: Any, cls: type[Any]) -> Captured:
    model, values = build.hf_model(config, cls)
    try:
        captured = capture_traced(model, hf_call(model), values)
    except SurgeryError as error:
        if not _mixes_types(error):
            raise
        # the class gives some parameters float32 of their own and does not run in any other type: they are of the model's type in it
        model, values = build.hf_model(config, cls, uniform=True)
        captured = capture_traced(model, hf_call(model), values)
    if _keeps_nothing(captured):  # an encoder of a family that has decoders, too
        captured = capture_traced(model, hf_call(model, past=False), values)
    captured.notes += note_of_cache(model)
    if build.draws_spec_augment(config):
        captured.notes += (
            "SpecAugment is drawn outside the graph: in training this module masks no features (apply_spec_augment = false)",
        )
    return captured


def _keeps_nothing(captured: Captured) -> bool:
    """Whether a cache goes in and none comes out."""
    return bool(cache_names(captured.signature.in_spec)) and not cache_names(captured.signature.out_spec)


def _mixes_types(error: SurgeryError) -> bool:
    """Whether a trace ended at a product of two types."""
    said = " ".join(note for d in error.diagnostics for note in d.notes)
    return "expected scalar type" in said or "to have the same dtype" in said


def capture_module(
    module: nn.Module, inputs: tuple[Any, ...] | dict[str, Any], *, dynamic: str | dict[str, Axes] = "batch, sequence"
) -> Captured:
    """The graph of any module from example inputs. The module is copied: no tensor is shared with it, none is changed.

    ``dynamic``: which axes stay open. ``"batch, sequence"``: axis 0 of every tensor, and axis 1 of integer tensors and of
    floating ones of three axes; ``"batch"``: axis 0 only; a dict gives ``{input: {axis: name}}``, where axes of one name
    have one size. Raises SurgeryError S0501-S0503, S0506 (inputs do not fit ``forward``), S0510 (noise of the module itself that cannot be switched off).
    """
    kind = build.main_dtype(module)
    clone, _ = build.meta_clone(module, kind)
    build.hoist_plain_tensors(clone)
    values = build.buffers_to_meta(clone, kind)
    clone.train()
    call = _bind(module, inputs, kind, dynamic)
    return capture_traced(clone, call, {name: v.detach().clone() for name, v in values.items()})


def _bind(
    module: nn.Module, inputs: tuple[Any, ...] | dict[str, Any] | None, kind: torch.dtype | None, dynamic: str | dict[str, Axes]
) -> Call:
    signature = inspect.signature(module.forward)
    if inputs is None:
        raise fail(
            "S0506", f"there are no example inputs for {type(module).__name__}.forward",
            help=f"give `inputs=`, or let the factory return (module, inputs); its parameters are {signature}",
        )  # fmt: skip
    try:
        bound = signature.bind(**inputs) if isinstance(inputs, dict) else signature.bind(*inputs)
    except TypeError as error:
        raise fail(
            "S0506", f"the example inputs do not fit {type(module).__name__}.forward: {error}", help=f"its parameters are {signature}"
        ) from error
    named: dict[str, Any] = {}
    for name, value in bound.arguments.items():
        variadic = signature.parameters[name].kind
        if variadic is inspect.Parameter.VAR_KEYWORD:
            named.update(value)
        elif variadic in (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.POSITIONAL_ONLY):
            raise fail(
                "S0506", f"{type(module).__name__}.forward takes `{name}` by position only",
                help="wrap the module in one whose forward names its inputs",
            )  # fmt: skip
        else:
            named[name] = value
    values = {n: _on_meta(v, kind) for n, v in named.items() if _has_tensors(v)}
    constants = {n: v for n, v in named.items() if n not in values}
    call = Call(values, {}, constants)
    call.axes, call.optional = _open_axes(call, dynamic)
    return call


def _has_tensors(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return any(_has_tensors(v) for v in value)
    if isinstance(value, dict):
        return any(_has_tensors(v) for v in value.values())
    return isinstance(value, Tensor) or hasattr(value, "get_seq_length")


def _on_meta(value: Any, kind: torch.dtype | None) -> Any:
    if isinstance(value, Tensor):
        return torch.empty_like(value, dtype=torch.bfloat16 if value.dtype == kind else value.dtype, device="meta", requires_grad=False)
    if isinstance(value, (list, tuple)):
        return type(value)(_on_meta(v, kind) for v in value)
    if isinstance(value, dict):
        return {k: _on_meta(v, kind) for k, v in value.items()}
    if hasattr(value, "get_seq_length"):
        from surgery.model.capture.flatcall import filled_cache

        return filled_cache([_on_meta(la.keys, kind) for la in value.layers], [_on_meta(la.values, kind) for la in value.layers])
    return value


def _open_axes(call: Call, dynamic: str | dict[str, Axes]) -> tuple[dict[str, Axes], frozenset[str]]:
    flat = call.flat()
    names = {name for name, _ in flat}
    if not isinstance(dynamic, str):
        unknown = sorted(set(dynamic) - names)
        if unknown:
            raise fail("S0506", f"`dynamic` names no input {unknown[0]!r}", help="the inputs are " + ", ".join(sorted(names)))
        return {n: dict(a) for n, a in dynamic.items()}, frozenset()
    words = {w.strip() for w in dynamic.split(",") if w.strip()}
    if not words <= {"batch", "sequence"}:
        raise fail("S0506", f"`dynamic` is {dynamic!r}", help='write "batch", "batch, sequence" or a dict {input: {axis: name}}')
    axes: dict[str, Axes] = {}
    batch = next((t.shape[0] for _, t in flat if t.ndim > 0), None)
    lengths: dict[int, str] = {}
    for name, tensor in flat:
        if tensor.ndim == 0:
            continue
        one: Axes = {0: "batch"} if "batch" in words and tensor.shape[0] == batch and tensor.shape[0] > 1 else {}
        sequential = (tensor.ndim == 2 and not tensor.dtype.is_floating_point) or tensor.ndim == 3
        if "sequence" in words and sequential and tensor.shape[1] > 1:
            size = tensor.shape[1]
            one[1] = lengths.setdefault(size, "sequence" if not lengths else f"sequence_{len(lengths)}")
        axes[name] = one
    return axes, frozenset(lengths.values())


def capture_traced(model: nn.Module, call: Call, values: dict[str, Tensor]) -> Captured:
    """The capture of a model that is on meta, called like ``call``; ``values`` are its buffers' values by name."""
    _refuse_names(model)
    wanted = {name: p.requires_grad for name, p in model.named_parameters(remove_duplicate=False)}
    tensors = Tensors(model, wanted)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    bound = build.stop_clipping(model)
    quiet: dict[str, str] = {}
    captured = _in_each_mode(model, call, values, tensors, quiet)
    captured.notes += tuple(
        f"{draw} is drawn outside the graph: in training this module runs {where} as in evaluation" for where, draw in quiet.items()
    )
    if bound is not None:
        captured.notes += (
            f"AltUp coefficients are clipped outside the graph: in training this module does not keep them within {bound:g} of zero",
        )
    return captured


def _in_each_mode(model: nn.Module, call: Call, values: dict[str, Tensor], tensors: Tensors, quiet: dict[str, str]) -> Captured:
    """The capture in training mode; where parts of the model compute something else in evaluation, those parts as in evaluation, with a note."""
    faced = modes.two_faced(model)
    found: Captured | SurgeryError
    try:
        found = _without_noise(model, call, values, tensors, quiet)
    except SurgeryError as error:
        found = error
    if faced:
        for module in faced.values():
            module.training = False
        try:
            calm = dict(quiet)
            other = _without_noise(model, call, values, tensors, calm)
        except SurgeryError:
            other = None
        finally:
            for module in faced.values():
                module.training = True
        if other is not None and (isinstance(found, SurgeryError) or modes.steps(found.graph) != modes.steps(other.graph)):
            quiet |= calm
            kinds = ", ".join(dict.fromkeys(type(m).__name__ for m in faced.values()))
            other.notes += (f"{kinds} may compute something else in training: in training this module runs them as in evaluation",)
            return other
    if isinstance(found, SurgeryError):
        raise found
    return found


def _without_noise(model: nn.Module, call: Call, values: dict[str, Tensor], tensors: Tensors, quiet: dict[str, str]) -> Captured:
    while True:
        try:
            return _captured(model, call, values, tensors)
        except Noise as noise:
            _calm(model, noise, quiet)


class Noise(Exception):
    """A part of the model draws in training only, in a form that a graph cannot switch off: ``scope`` is its path, ``draw`` the operation."""

    def __init__(self, model: nn.Module, scope: str, draw: str) -> None:
        self.scope, self.draw = scope, draw
        self.error = fail(
            "S0510", f"{type(model).__name__} draws random numbers in training only, in a form that a graph cannot switch off: {draw}"
            + (f" in {scope}" if scope else ""),
            help="write the noise as nn.Dropout, as stochastic depth or as `x * torch.empty_like(x).uniform_(a, b)`, or set its rate to zero",
        )  # fmt: skip


def _calm(model: nn.Module, noise: Noise, quiet: dict[str, str]) -> None:
    """Makes a part that draws, with all of its class, the dropout that it is, or lets it run as in evaluation and notes that in ``quiet``; S0510
    for the model itself and for a part that draws all the same."""
    parts = dict(model.named_modules())
    part = parts.get(noise.scope)
    kind = type(part)
    if not noise.scope or part is None or not part.training or kind.__module__.startswith("torch.nn"):
        raise noise.error from None
    same = [path for path, module in parts.items() if type(module) is kind]
    if dropouts.is_dropout(part):
        for path in same:
            dropouts.make_plain(parts[path])
        return
    for path in same:
        parts[path].eval()
    quiet[noise.scope if len(same) == 1 else f"{noise.scope} and {len(same) - 1} more of its class"] = noise.draw


def _captured(model: nn.Module, call: Call, values: dict[str, Tensor], tensors: Tensors) -> Captured:
    """With twins stamped, else layer by layer."""
    reason = ""
    try:
        return _assemble(model, call, values, tensors, trace(model, call, stubs=True), reason)
    except Fallback as fallback:
        reason = str(fallback)
    except SurgeryError as error:
        if error.diagnostics[0].code != "S0501":
            raise  # the model itself depends on values or fixes a size: tracing every layer meets the same line
        reason = str(error)
    try:
        return _assemble(model, call, values, tensors, trace(model, call, stubs=False), reason)
    except Fallback as fallback:
        raise fail(
            "S0501", f"{type(model).__name__} cannot be captured: {fallback}", help="report this with the model's config"
        ) from fallback


def _refuse_names(model: nn.Module) -> None:
    """S0511 for a module or tensor whose name cannot be a step of a path in a stored graph."""
    for path, module in model.named_modules():
        names = [*([path.rpartition(".")[2]] if path else []), *module._parameters, *module._buffers]
        for name in names:
            if not is_word(name):
                raise fail(
                    "S0511", f"{type(model).__name__} has a part called {name!r}" + (f" (at {path})" if path else "") + ", which no stored graph can name",
                    help="rename it: letters, digits, `_` and `-`, no Python keyword, no `__` in front",
                )  # fmt: skip


def _assemble(model: nn.Module, call: Call, values: dict[str, Tensor], tensors: Tensors, traced: Trace, reason: str) -> Captured:
    exported = traced.exported
    gm, signature = exported.graph_module, exported.graph_signature
    stored = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    owners = {ph: tensors.all_names[tensors.first[full.removeprefix("model.")]] for ph, full in stored.items()}
    lifted_names = dict(signature.inputs_to_lifted_tensor_constants)
    lifted = {ph: exported.constants[full].detach() for ph, full in lifted_names.items()}
    _refuse_lost_values(model, gm.graph, lifted)
    parameters = {ph for ph in owners if ph in signature.inputs_to_parameters}
    placeholders = [n for n in gm.graph.nodes if n.op == "placeholder"]
    inputs = traced.likes.restore(gm.graph, [n for n in placeholders if n.name not in owners and n.name not in lifted])
    flatten.inline_wrappers(gm, parameters | {n.name for n in inputs})
    flatten.drop_checks(gm.graph)
    symbols = flatten.Symbols()
    for name, node in zip(traced.names, inputs, strict=True):
        symbols.declare(name, node.meta["val"])
    flatten.attach_specs(gm.graph.nodes, symbols)
    fold_scalars(gm.graph, lifted)
    lifted_targets = {ph: _attribute(i) for i, ph in enumerate(lifted)}
    Normaliser(model, owners).run(gm.graph)
    flatten.drop_dead(gm.graph)
    _refuse_training_noise(model, call, gm.graph)
    root = Cutter(gm.graph, traced.regions, owners, lifted_targets).cut(flat_names(call.tree()))
    graph, constants = stand_up(root, tensors, model, {lifted_targets[ph]: v for ph, v in lifted.items()})
    constants.update({name: values[name] for name in sorted(tensors.temporary) if name in values})
    return Captured(
        graph=graph,
        signature=Signature(
            parameters=tuple(call.values),
            in_spec=call.tree(),
            out_spec=traced.out_tree,
            constants=dict(call.constants),
            symbols=symbols.origins,
        ),
        aliases=tensors.aliases,
        constants=constants,
        parameters={
            name: (tuple(t.shape), str(t.dtype).removeprefix("torch."))
            for name in tensors.first
            if name not in tensors.temporary
            for t in [tensors.of(name)]
        },
        fallback=reason,
        notes=tuple(
            f"layer drop is drawn outside the graph: in training this module runs every layer (the model skips each with probability {rate:g})"
            for rate in traced.skips
        )
        + traced.answers,
    )


def _refuse_lost_values(model: nn.Module, graph: fx.Graph, lifted: dict[str, Tensor]) -> None:
    """S0501 for a tensor that the model's code makes in a way that leaves its values on meta: nothing could fill it in later."""
    lost = next((n for n in graph.nodes if n.op == "placeholder" and n.name in lifted and lifted[n.name].is_meta), None)
    if lost is not None:
        user = next(iter(lost.users), lost)
        lines = [ln.strip() for ln in str(user.meta.get("stack_trace") or "").splitlines() if ln.strip().startswith("File ")]
        raise fail(
            "S0501", f"{type(model).__name__} makes a tensor of shape {list(lifted[lost.name].shape)} whose values cannot be captured"
            + (f": {lines[-1]}" if lines else ""),
            help="make it in `__init__` and keep it as a buffer",
        )  # fmt: skip


def _refuse_training_noise(model: nn.Module, call: Call, graph: fx.Graph) -> None:
    """Random draws that no leaf stands for would go on in evaluation: fine where the model draws there too, else raises Noise.

    Only a graph with such draws costs the second trace, in evaluation mode.
    """
    drawn = draws(graph)
    if not drawn:
        return
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        also = draws(trace(model, call, stubs=True).exported.graph)
    finally:
        for module, training in modes.items():
            module.training = training
    for target, scope in drawn.items():
        if target not in also:
            raise Noise(model, scope, target.removesuffix(".default"))


def _attribute(index: int) -> str:
    return f"constant_{index}"
