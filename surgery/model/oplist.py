"""The operations that a stored graph may name, one by one.

Whole namespaces are not allowed: ``aten`` holds operations that open files (``from_file``), hand out raw storage or resize
memory. The list covers every operation that the supported families record, what normalisation puts in their place, and
the everyday functional operations of hand-written modules. A test reads it against torch: every entry exists, and only the
entries of ``IN_PLACE`` write to an argument.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

import torch

IN_PLACE = frozenset(
    "aten." + name
    for name in """
    add_.Scalar add_.Tensor clamp_.default copy_.default detach_.default div_.Scalar div_.Tensor fill_.Scalar fill_.Tensor hardswish_.default
    index_add_.default index_copy_.default index_put_.default leaky_relu_.default masked_fill_.Scalar masked_fill_.Tensor mul_.Scalar mul_.Tensor
    relu_.default scatter_.src scatter_.value sigmoid_.default silu_.default sub_.Scalar sub_.Tensor zero_.default
    """.split()
)

PURE = frozenset(
    "aten." + name
    for name in """
    __and__.Scalar __and__.Tensor _weight_norm.default __or__.Scalar __or__.Tensor __xor__.Tensor _grouped_mm.default _softmax.default
    _to_copy.default _unsafe_view.default abs.default acos.default acosh.default adaptive_avg_pool1d.default adaptive_avg_pool2d.default
    adaptive_avg_pool3d.default adaptive_max_pool2d.default add.Scalar add.Tensor addbmm.default addcdiv.default addcmul.default addmm.default
    addmv.default alias.default all.default all.dim amax.default amin.default any.default any.dim arange.default arange.start arange.start_step
    argmax.default argmin.default argsort.default argsort.stable asin.default asinh.default atan.default atan2.default atanh.default
    avg_pool1d.default avg_pool2d.default avg_pool3d.default baddbmm.default batch_norm.default bilinear.default bitwise_and.Scalar
    bitwise_and.Tensor bitwise_not.default bitwise_or.Scalar bitwise_or.Tensor bitwise_xor.Tensor bmm.default broadcast_to.default
    bucketize.Tensor cat.default cdist.default ceil.default celu.default chunk.default clamp.Tensor clamp.default clamp_max.default
    clamp_min.default clone.default concat.default constant_pad_nd.default contiguous.default conv1d.default conv1d.padding conv2d.default
    conv2d.padding conv3d.default conv3d.padding conv_transpose1d.default conv_transpose2d.input convolution.default copysign.Tensor cos.default
    cosh.default cosine_similarity.default count_nonzero.dim_IntList cummax.default cumprod.default cumsum.default detach.default
    diag_embed.default diagonal.default diff.default div.Scalar div.Scalar_mode div.Tensor div.Tensor_mode dot.default dropout.default
    einsum.default elu.default embedding.default embedding_bag.padding_idx empty_like.default eq.Scalar eq.Tensor erf.default erfc.default
    erfinv.default exp.default exp2.default expand.default expand_as.default expm1.default eye.default fft_fft.default fft_fft2.default
    fft_fftn.default flatten.using_ints flip.default floor.default floor_divide.Scalar floor_divide.default fmod.Scalar fmod.Tensor frac.default
    full.default full_like.default gather.default ge.Scalar ge.Tensor gelu.default glu.default grid_sampler.default group_norm.default gt.Scalar
    gt.Tensor hardsigmoid.default hardswish.default hardtanh.default histc.default hypot.default im2col.default index.Tensor index_add.default
    index_copy.default index_put.default index_select.default instance_norm.default isfinite.default isinf.default isnan.default
    layer_norm.default le.Scalar le.Tensor leaky_relu.default lerp.Scalar lerp.Tensor lgamma.default lift_fresh_copy.default
    linalg_vector_norm.default linear.default linspace.default log.default log10.default log1p.default log2.default log_sigmoid.default
    log_softmax.int logaddexp.default logical_and.default logical_not.default logical_or.default logical_xor.default logit.default
    logsumexp.default lt.Scalar lt.Tensor masked_fill.Scalar masked_fill.Tensor masked_select.default matmul.default max.default max.dim
    max.other max_pool1d.default max_pool2d.default max_pool3d.default maximum.default mean.default mean.dim meshgrid.default meshgrid.indexing
    min.default min.dim min.other minimum.default mish.default mm.default movedim.int movedim.intlist mul.Scalar mul.Tensor multinomial.default
    mv.default nan_to_num.default narrow.default native_group_norm.default native_layer_norm.default ne.Scalar ne.Tensor neg.default
    new_empty.default new_full.default new_ones.default new_zeros.default nonzero.default norm.ScalarOpt_dim numpy_T.default one_hot.default
    ones.default ones_like.default outer.default pad.default permute.default pixel_shuffle.default pixel_unshuffle.default polar.default
    pow.Scalar pow.Tensor_Scalar pow.Tensor_Tensor prelu.default prod.default prod.dim_int rand.default rand_like.default randn.default
    randn_like.default real.default reciprocal.default relu.default relu6.default remainder.Scalar remainder.Tensor repeat.default
    repeat_interleave.Tensor repeat_interleave.self_Tensor repeat_interleave.self_int reshape.default rms_norm.default roll.default
    round.default rsqrt.default rsub.Scalar rsub.Tensor scalar_tensor.default scaled_dot_product_attention.default scatter.src scatter.value
    scatter_add.default scatter_reduce.two searchsorted.Tensor select.int select_scatter.default selu.default sigmoid.default sign.default
    silu.default sin.default sinc.default sinh.default slice.Tensor slice_scatter.default softmax.int softplus.default sort.default sort.stable
    split.Tensor split.sizes split_with_sizes.default sqrt.default square.default squeeze.default squeeze.dim squeeze.dims stack.default
    std.correction std.dim sub.Scalar sub.Tensor sum.default sum.dim_IntList swapaxes.default sym_numel.default sym_size.int sym_stride.int
    t.default tan.default tanh.default tensor_split.indices tensor_split.sections tile.default to.device to.dtype to.dtype_layout to.other
    topk.default transpose.int tril.default triu.default trunc.default type_as.default unbind.int unflatten.int unfold.default unsqueeze.default
    upsample_bicubic2d.default upsample_bicubic2d.vec upsample_bilinear2d.default upsample_bilinear2d.vec upsample_linear1d.default
    upsample_linear1d.vec upsample_nearest1d.default upsample_nearest1d.vec upsample_nearest2d.default upsample_nearest2d.vec var.correction
    var.dim var_mean.correction vdot.default view.default view_as.default view_as_complex.default view_as_real.default where.Scalar
    where.ScalarOther where.ScalarSelf where.default where.self xlogy.Tensor zeros.default zeros_like.default
    """.split()
)
OURS = frozenset({"surgery.grouped_mm.default", "surgery.recurrence.default", "surgery.running_maximum.default"})
"""Operations of this package (``surgery.model.grouped``, ``surgery.model.recurrence``)."""
ATEN = PURE | IN_PLACE | OURS

PYTHON: dict[str, Callable[..., Any]] = {
    **{
        f"operator.{name}": getattr(operator, name)
        for name in ("add and_ eq floordiv ge getitem gt le lt mod mul ne neg not_ or_ pos pow sub truediv").split()
    },
    **{
        f"torch.{name}": getattr(torch, name)
        for name in ("sym_float sym_int sym_ite sym_max sym_min sym_not sym_sqrt sym_sum").split()
        if hasattr(torch, name)
    },
    **{f"math.{name}": getattr(math, name) for name in ("ceil floor sqrt trunc").split()},
}
_PYTHON_NAME = {function: name for name, function in reversed(PYTHON.items())}


def target_name(target: Any) -> str | None:
    """``aten.add.Tensor`` or ``operator.add``; None when the target is not on the list."""
    if isinstance(target, torch._ops.OpOverload):
        return str(target) if str(target) in ATEN else None
    try:
        return _PYTHON_NAME.get(target)
    except TypeError:
        return None


def overload(name: str) -> torch._ops.OpOverload:
    """The torch operation of a name on the list; AttributeError when this torch lacks it."""
    space, packet, overload_name = name.split(".")
    if name in OURS:
        from surgery.model import grouped, recurrence  # noqa: F401  (registers them)
    return getattr(getattr(getattr(torch.ops, space), packet), overload_name)


def schema(target: torch._ops.OpOverload) -> str:
    return str(target._schema)
