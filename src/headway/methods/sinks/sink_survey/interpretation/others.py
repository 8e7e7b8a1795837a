"""Further explanations: structure, over-mixing, spectra, dormant heads, compression, norms.

Each says what a sink would be for, and gives the number that the explanation predicts. Survey: arXiv 2604.10098. The
borders of verdicts are ours, named below; the numbers are what to read.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from headway.door.rotary import host_frequencies
from headway.errors import ArgumentError, HostError
from headway.methods.sinks.sink_survey.interpretation.finding import Finding, judged

#: A first token explained by visibility alone gets no more than this many times what even attention would give it.
STRUCTURE = 2.0
#: Mixing with the sink is at most this share of that without it; one more token of any kind thins it out a little.
CALMED = 0.5
#: A top singular value with at least this share of the energy rules the states.
RULES = 0.5
#: A head is dormant when its output's norm at sinking rows is at most this share of that at its other rows.
DORMANT = 0.5
#: Entropy in the middle at most this share of both ends: mix, compress, refine.
VALLEY = 0.7
#: A norm layer takes at least this factor off the sink's lead.
RESCALED = 10.0


def visibility(alpha: Float[Tensor, " keys"]) -> Finding:
    """Structural: the mean attention of the first token over what even attention over the causal past gives it, which
    is its visibility alone. "yes": visibility explains it."""
    tokens = alpha.numel()
    even = float(torch.arange(1, tokens + 1).double().reciprocal().mean())
    factor = float(alpha[0]) / even
    return judged(
        "explained by visibility",
        factor,
        at_most=STRUCTURE,
        sentence=f"the first token gets {factor:.1f} × what even attention gives it",
        details={"even": even, "alpha": float(alpha[0])},
    )


def rotary_decay(frequencies: Float[Tensor, " pairs"], *, distances: Sequence[int] = (1, 16, 64, 256, 1024)) -> Finding:
    """Structural: how the product of equal query and key falls with distance under rotary positions,
    B(m) = mean_p cos(m θ_p). The number is the mean of B at the far half of `distances` over that at the near half;
    "yes" (the rotation works against far sinks) below 1."""
    if len(distances) < 2:
        raise ArgumentError(f"distances: got {list(distances)}, expected at least two.")
    course = [float(torch.cos(m * frequencies.double()).mean()) for m in sorted(distances)]
    half = len(course) // 2
    near, far = sum(course[:half]) / half, sum(course[half:]) / (len(course) - half)
    return judged(
        "rotary decay", far / near, at_most=0.999, sentence=f"{far:.2f} far, {near:.2f} near",
        details={"distances": sorted(distances), "course": course},
    )  # fmt: skip


def rotary_decay_of_model(model: nn.Module, **options: Any) -> Finding:
    """`rotary_decay` with the frequencies of a host."""
    frequencies, _ = host_frequencies(model, 0)
    if frequencies is None:
        raise HostError(f"{type(model).__name__}: got a host without rotary positions, expected RoPE.")
    return rotary_decay(frequencies, **options)


@torch.no_grad()
def over_mixing(
    model: nn.Module, ids: Int[Tensor, "batch tokens"], *, sink: int | None = None, size: float = 0.1, seed: int = 0
) -> Finding:
    """Does the sink keep tokens from mixing? The second token's embedding is moved by `size` of its length; the number
    is how far the last token's final state moves with the sink in front, over how far without it.

    sink: a token id to put in front (a beginning-of-sequence token); None takes the first token of `ids` as the sink
    and leaves it out in the other run."""
    embed = model.get_input_embeddings()  # type: ignore[operator]
    text = ids if sink is not None else ids[:, 1:]
    front = torch.full_like(ids[:, :1], sink) if sink is not None else ids[:, :1]
    generator = torch.Generator().manual_seed(seed)
    x = embed(text)
    noise = torch.randn(x[:, 1].shape, generator=generator).to(x)
    noise = size * noise / noise.norm(dim=-1, keepdim=True) * x[:, 1].norm(dim=-1, keepdim=True)
    moved = x.clone()
    moved[:, 1] += noise

    def last(e: Tensor) -> Tensor:
        return model(inputs_embeds=e, output_hidden_states=True, use_cache=False).hidden_states[-1][:, -1].float()

    def change(head: Tensor | None) -> float:
        with_head = [e if head is None else torch.cat([head, e], 1) for e in (x, moved)]
        first, second = (last(e) for e in with_head)
        return float((first - second).norm(dim=-1).mean())

    with_sink, without = change(embed(front)), change(None)
    ratio = with_sink / without if without > 0 else float("nan")
    return judged(
        "calms mixing",
        ratio,
        at_most=CALMED,
        sentence=f"a nudge moves the last token by {with_sink:.2g} with the sink, {without:.2g} without",
        details={"with": with_sink, "without": without},
    )


def spectral_energy(hidden: Float[Tensor, "tokens width"]) -> Finding:
    """The share of the top singular value in the energy of the states, Σσ². A massive sink makes it rule them."""
    energy = torch.linalg.svdvals(hidden.float()).square()
    share = float(energy[0] / energy.sum()) if float(energy.sum()) > 0 else float("nan")
    return judged(
        "one singular value rules", share, at_least=RULES, sentence=f"{share:.0%} of the energy in the first",
        details={"shares": (energy / energy.sum())[:8].tolist()},
    )  # fmt: skip


def dormant_head(
    share: Float[Tensor, "*batch rows"], output: Float[Tensor, "*batch rows dim"], *, threshold: float = 0.5
) -> Finding:
    """Active or dormant: the mean norm of a head's output at rows with at least `threshold` of attention on the sink,
    over that at its other rows. "yes": the head sleeps when it looks at the sink."""
    norms, asleep = output.float().norm(dim=-1), share >= threshold
    both = bool(asleep.any()) and bool((~asleep).any())
    ratio = float(norms[asleep].mean() / norms[~asleep].mean()) if both else float("nan")
    return judged(
        "dormant at the sink",
        ratio,
        at_most=DORMANT,
        sentence=f"output of {ratio:.2f} × the length of other rows at {float(asleep.float().mean()):.0%} of the rows",
        requires=(both, f"{float(asleep.float().mean()):.0%} of the rows sink: both kinds are needed"),
        details={"sinking_rows": float(asleep.float().mean())},
    )


def matrix_entropy(hidden: Float[Tensor, "tokens width"]) -> float:
    """−Σ p ln p with p = σ² / Σσ², over ln of the number of singular values: 1 for states in all directions alike."""
    energy = torch.linalg.svdvals(hidden.float()).square()
    p = energy / energy.sum().clamp(min=1e-30)
    return float(torch.special.entr(p).sum() / torch.tensor(float(p.numel())).log())


def mix_compress_refine(states: Sequence[Float[Tensor, "tokens width"]]) -> Finding:
    """Matrix entropy by block: least in the middle half, over the smaller of the two ends. "yes": a valley, states are
    compressed between mixing and refining."""
    if len(states) < 4:
        raise ArgumentError(f"states: got {len(states)}, expected at least 4 blocks.")
    course = [matrix_entropy(h) for h in states]
    quarter = len(course) // 4
    ends = min(max(course[:quarter] or course[:1]), max(course[-quarter:] or course[-1:]))
    ratio = min(course[quarter : len(course) - quarter]) / ends if ends > 0 else float("nan")
    return judged(
        "mix, compress, refine", ratio, at_most=VALLEY, sentence=f"entropy falls to {ratio:.2f} of its ends",
        details={"by_block": course},
    )  # fmt: skip


def rescaling(
    before: Float[Tensor, "*batch tokens width"], after: Float[Tensor, "*batch tokens width"], *, sink: int = 0
) -> Finding:
    """Norm layers: the sink's lead in norm over the mean of the others before a norm layer, over that after it. "yes":
    the layer turns a massive state into an ordinary one, whose direction alone matters."""

    def lead(x: Tensor) -> float:
        norms = x.float().norm(dim=-1)
        others = [t for t in range(norms.shape[-1]) if t != sink]
        return float((norms[..., sink] / norms[..., others].mean(-1)).mean())

    first, second = lead(before), lead(after)
    return judged(
        "rescaled by the norm",
        first / second,
        at_least=RESCALED,
        sentence=f"the sink is {first:.1f} × as long as others before the norm, {second:.1f} × after it",
        details={"before": first, "after": second},
    )
