"""What makes an MLP write a sink: the sinks of a layer against tokens of the same ids that did not become sinks.

    contrast     same token ids, never flagged; as many as there are sinks, drawn with a seed
    separation   k-means with two clusters on the centred vectors: balanced accuracy against sink / not (0.5 = none)
    probes       MLP(s·PC_k) for the principal components of the attention output, both signs, a range of scales s:
                 its norm and its cosine with the primary's output

Many directions map onto one output direction: large |cosine| for several components and signs. Paper: arXiv 2512.22213.
The probes feed the MLP directly, without the norm before it, as a scale would otherwise have no effect.
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from headway.errors import ArgumentError
from headway.methods.sinks.secondary_sinks.detection import stream_cosines, token_norms

#: Seed of the contrast sample in the released code.
SEED = 42
#: Fewest sinks, and fewest others, that two clusters and a component can be read from.
FEWEST = 8
COMPONENTS = 5
#: Scales of a probe, in standard deviations of the data along its component.
SCALES = (0.5, 1.0, 2.0, 4.0, 8.0)
#: Where sinks and others are compared; the down output of the MLP is what it writes.
SPACES = ("attention", "residual", "down")
#: scikit-learn's t-SNE needs a perplexity below the number of points; 30 is its default.
PERPLEXITY = 30


@dataclass(frozen=True, kw_only=True)
class Space:
    """Sinks against others in one space: balanced accuracy of two clusters, shares of variance of the first principal
    components, and coordinates (sinks first) on the first two, and by t-SNE where scikit-learn is installed."""

    separation: float
    variance: list[float]
    points: list[list[float]]
    tsne: list[list[float]] | None


@dataclass(frozen=True, kw_only=True)
class Probe:
    """One input s·PC_k through the MLP: component k (from 0), its sign, the scale in standard deviations and as a
    length, the norm of the output and its cosine with the primary's output."""

    component: int
    sign: int
    scale: float
    length: float
    norm: float
    cosine: float


@dataclass(frozen=True, kw_only=True)
class Trigger:
    """The trigger analysis of one creating layer, over `sinks` sinks and `others` contrast tokens."""

    layer: int
    sinks: int
    others: int
    positions: list[int]
    contrast: list[int]
    spaces: dict[str, Space]
    probes: list[Probe]


def contrast_positions(
    ids: Int[Tensor, " tokens"], sinks: Sequence[int], excluded: Sequence[int], *, seed: int = SEED
) -> list[int]:
    """Positions with the same token ids as the sinks that are in neither list: as many as there are sinks (fewer when
    the text has fewer), drawn without replacement with the given seed, in order."""
    taken = {*sinks, *excluded}
    same = torch.isin(ids.cpu(), ids.cpu()[list(sinks)]).nonzero()[:, 0].tolist() if sinks else []
    free = [t for t in same if t not in taken]
    count = min(len(sinks), len(free))
    return sorted(np.random.default_rng(seed).choice(free, size=count, replace=False).tolist()) if count else []


def separation(points: Float[np.ndarray, "points dim"], sinks: Sequence[bool], *, seed: int = SEED) -> float:
    """Balanced accuracy with which two k-means clusters tell sinks from others: 1 = perfectly, 0.5 = not at all."""
    from scipy.cluster.vq import kmeans2

    truth = np.asarray(sinks, dtype=bool)
    if truth.all() or not truth.any():
        raise ArgumentError("sinks: got tokens of one kind only, expected both sinks and others.")
    centred = points - points.mean(0)
    if not np.abs(centred).max() > 0:
        return 0.5
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        _, cluster = kmeans2(centred, 2, minit="++", rng=np.random.default_rng(seed))
    hit = (np.mean(cluster[truth] == 1) + np.mean(cluster[~truth] == 0)) / 2
    return float(max(hit, 1 - hit))


def principal_components(
    points: Float[np.ndarray, "points dim"], count: int = COMPONENTS
) -> tuple[Float[np.ndarray, "count dim"], Float[np.ndarray, " count"], Float[np.ndarray, " count"]]:
    """Unit components of the centred points, the standard deviation along each, and its share of the variance. The sign
    of a component is the one that makes its largest entry positive."""
    centred = points - points.mean(0)
    _, values, components = np.linalg.svd(centred, full_matrices=False)
    total = max(float((values**2).sum()), np.finfo(float).tiny)
    components = components[:count]
    signs = np.sign(components[np.arange(len(components)), np.abs(components).argmax(1)])
    signs[signs == 0] = 1
    return components * signs[:, None], values[:count] / np.sqrt(len(points)), values[:count] ** 2 / total


def probe_components(
    apply: Callable[[Tensor], Tensor],
    components: Float[np.ndarray, "count dim"],
    deviations: Float[np.ndarray, " count"],
    reference: Float[Tensor, " width"],
    *,
    scales: Sequence[float] = SCALES,
) -> list[Probe]:
    """‖MLP(s·PC_k)‖ and cos(MLP(s·PC_k), reference) for both signs and every scale. `apply` is the MLP on rows."""
    probes = []
    for k, (component, deviation) in enumerate(zip(components, deviations, strict=True)):
        if not deviation > 0:
            continue
        signed = [(sign, scale) for sign in (1, -1) for scale in scales]
        lengths = torch.tensor([sign * scale * float(deviation) for sign, scale in signed])
        outputs = apply(lengths[:, None] * torch.from_numpy(component).float()).float().cpu()
        norms, cosines = token_norms(outputs), stream_cosines(outputs, reference)
        probes += [
            Probe(
                component=k,
                sign=sign,
                scale=float(scale),
                length=float(lengths[i].abs()),
                norm=float(norms[i]),
                cosine=float(cosines[i]),
            )
            for i, (sign, scale) in enumerate(signed)
        ]
    return probes


def analyse_triggers(
    layer: int,
    positions: Sequence[int],
    contrast: Sequence[int],
    sinks: Mapping[str, Float[Tensor, "sinks dim"]],
    others: Mapping[str, Float[Tensor, "others dim"]],
    apply: Callable[[Tensor], Tensor] | None,
    reference: Float[Tensor, " width"],
    *,
    seed: int = SEED,
    scales: Sequence[float] = SCALES,
    tsne: bool = False,
) -> Trigger:
    """The trigger analysis of one layer from the vectors of its sinks and its contrast tokens in each space.

    `apply` None leaves the probes out. `tsne` adds t-SNE coordinates where scikit-learn is installed (`has_tsne`)."""
    truth = [True] * len(positions) + [False] * len(contrast)
    spaces, probes = {}, []
    for name in SPACES:
        if name not in sinks or name not in others:
            continue
        points = torch.cat([sinks[name], others[name]]).double().numpy()
        components, deviations, shares = principal_components(points)
        flat = (points - points.mean(0)) @ components[:2].T
        spaces[name] = Space(
            separation=separation(points, truth, seed=seed),
            variance=shares.tolist(),
            points=flat.tolist(),
            tsne=_tsne(points, seed) if tsne and has_tsne() else None,
        )
        if name == "attention" and apply is not None:
            probes = probe_components(apply, components, deviations, reference, scales=scales)
    return Trigger(
        layer=layer,
        sinks=len(positions),
        others=len(contrast),
        positions=[int(p) for p in positions],
        contrast=[int(p) for p in contrast],
        spaces=spaces,
        probes=probes,
    )


def has_tsne() -> bool:
    """Whether scikit-learn, which t-SNE needs, is installed."""
    return importlib.util.find_spec("sklearn") is not None


def _tsne(points: Float[np.ndarray, "points dim"], seed: int) -> list[list[float]]:
    from sklearn.manifold import TSNE

    perplexity = min(PERPLEXITY, (len(points) - 1) / 3)
    return (
        TSNE(n_components=2, perplexity=perplexity, random_state=seed).fit_transform(points - points.mean(0)).tolist()
    )
