from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from surgery.core.diagnostics import fail
from surgery.core.method import param
from surgery.passes.kinds.adapter_method import AdapterMerge


@dataclass(frozen=True)
class Lego(AdapterMerge):
    """Adapters taken apart into rank-one terms, which are clustered and averaged.

    Each rank ``j`` of adapter ``i`` is one point ``m = [a_ij; b_ij]``, a row of ``A`` and a column of ``B`` with the root of its scale and factor in
    both (the sign in ``A``). k-means (L2, k-means++, ``restarts`` starts, at most ``iterations`` rounds) divides them into ``rank`` clusters, and the
    mean ``mu`` of each gives one rank of the merged adapter:

        mu <- mu * mean_{m in cluster} |m|_inf / |mu|_inf        ``reweight``: undoes the shrinking of means
        B A <- sqrt(r / rank) B A                                ``output``: undoes the growth of a sum; r is the mean rank of the adapters

    ``rank = 0`` is that mean rank. With as many clusters as terms and ``output`` off it is the exact sum. ``features = unit`` clusters by directions
    alone (``a`` and ``b`` each of length one); means are of the points themselves either way. ``balance`` first makes ``a`` and ``b`` of equal length
    with the largest entry positive, so that one term is one point; the paper does not.

        merge lego(rank = 8) of news, legal

    Source: Zhao et al., "Merging LoRAs like Playing LEGO", 2024, arXiv:2409.16167, section 4.
    """

    adapters: ClassVar[str] = "terms"

    rank: int = param(0, "clusters, the rank of the merged adapter; 0 takes the mean rank of the adapters", min=0)
    reweight: bool = param(True, "scale each mean to the largest entry that its members have on average")
    output: bool = param(True, "scale the result by the root of the adapters' rank over the merged one")
    features: Literal["raw", "unit"] = param("raw", "what is clustered: the points, or both their halves at length one")
    balance: bool = param(False, "give both halves of a point one length and a fixed sign first")
    restarts: int = param(10, "starts of k-means, the best is taken", min=1, max=1000)
    iterations: int = param(300, "rounds of k-means at most", min=1, max=100_000)
    seed: int = param(0, "changes the starts of k-means", min=0)


def terms(*tensors: Tensor, scales: Any, size: int, number: int, **params: Any) -> tuple[Tensor, Tensor]:
    """``A`` and ``B`` of the clusters' means. ``number`` seeds k-means."""
    method = Lego(**params)
    roots = [math.sqrt(abs(s)) for s in scales]
    a = torch.cat([t.float().flatten(1) * math.copysign(r, s) for t, r, s in zip(tensors[::2], roots, scales, strict=True)])
    b = torch.cat([t.float().flatten(1) * r for t, r in zip(tensors[1::2], roots, strict=True)], dim=1).t()
    if method.balance:
        a, b = balanced(a, b)
    points = torch.cat([a, b], dim=1).double()
    labels = clusters(a, b, size, method, number)
    means = averaged(points, labels, size, method.reweight)
    rank = sum(t.shape[0] for t in tensors[::2]) / len(scales)
    root = (rank / size) ** 0.25 if method.output else 1.0
    left, right = (means * root).float().split([a.shape[1], b.shape[1]], dim=1)
    shape_a, shape_b = tensors[0].shape[1:], tensors[1].shape[2:]
    return left.reshape(size, *shape_a).contiguous(), right.t().reshape(-1, size, *shape_b).contiguous()


def averaged(points: Tensor, labels: np.ndarray, size: int, reweight: bool) -> Tensor:
    """The mean of each cluster, scaled to the mean largest entry of its members where ``reweight`` says so."""
    out = torch.zeros(size, points.shape[1], dtype=points.dtype)
    for c in range(size):
        members = points[torch.from_numpy(labels == c)]
        if not len(members):
            continue  # equal points in several clusters leave some of them empty
        mean = members.mean(0)
        peak = float(mean.abs().max())
        if reweight and peak > 0:
            mean = mean * (float(members.abs().amax(1).mean()) / peak)
        out[c] = mean
    return out


def balanced(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """The same terms with ``|a| = |b|`` and the entry of largest magnitude of ``a`` positive."""
    na, nb = a.norm(dim=1, keepdim=True), b.norm(dim=1, keepdim=True)
    ratio = torch.where((na > 0) & (nb > 0), (nb / na.clamp_min(1e-30)).sqrt(), torch.ones_like(na))
    sign = torch.sign(a.gather(1, a.abs().argmax(1, keepdim=True)))
    sign = torch.where(sign == 0, torch.ones_like(sign), sign)
    return a * ratio * sign, b / ratio * sign


def clusters(a: Tensor, b: Tensor, size: int, method: Lego, number: int) -> np.ndarray:
    """The cluster of each term. Every term is one of its own where there are as many as clusters."""
    if size == a.shape[0]:
        return np.arange(size)
    if size == 1:
        return np.zeros(a.shape[0], int)
    if method.features == "unit":
        a, b = (t / t.norm(dim=1, keepdim=True).clamp_min(1e-30) for t in (a, b))
    try:
        from sklearn.cluster import KMeans
        from threadpoolctl import threadpool_limits
    except ImportError as exc:
        raise fail(
            "S0786",
            "merge lego clusters with scikit-learn, which is not installed",
            exit_code=2,
            help="install it: `pip install 'model-surgery[merge]'`",
        ) from exc
    import warnings

    points = torch.cat([a, b], dim=1).double().numpy()
    with threadpool_limits(1), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # fewer distinct points than clusters: the empty ones stay zero
        found = KMeans(size, n_init=method.restarts, max_iter=method.iterations, random_state=number % (1 << 32)).fit(points)
    return np.asarray(found.labels_)
