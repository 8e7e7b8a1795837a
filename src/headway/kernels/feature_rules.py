"""How features of query and key become attention weights: the subtractive rule of InLine attention, the divisive one.

    a_ij = s · φ(q_i)·φ(k_j) ,   j in the n_i keys that i sees
    subtractive   w_ij = ( a_ij − ā_i + 1 ) / n_i ,        ā_i = mean of a_ij over the keys seen
    divisive      w_ij = ( a_ij + ε ) / Σ_j ( a_ij + ε )

Rows of both sum to one. Subtractive weights may be negative and know no denominator, so any φ will do; two queries get
the same row only if φ(q) − φ(p) is orthogonal to every φ(k_j) − mean φ(k). Divisive weights are those of ordinary
linear attention (arXiv 2006.16236): all queries on one ray get one row. They need φ ≥ 0, and ε keeps a row whose
features are all zero at the average of what it sees.

Paper: Bridging the Divide: Reconsidering Softmax and Linear Attention, arXiv 2412.06590. There φ(q)·φ(k) is summed and
not scaled; the released code takes s / n with s = dim^-½, which is the form here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional

from headway.errors import ArgumentError, unknown
from headway.kernels.dense import grouped_scores

NORMALISERS = ("subtractive", "divisive")
#: Slope of the exponential feature map exp(0.2·x), and where its argument stops: e^20 squared and summed over a million
#: keys is far from the end of float32.
EXP_SLOPE, EXP_LIMIT = 0.2, 20.0
_FEATURES: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda x: x,
    "relu": torch.relu,
    "leaky_relu": functional.leaky_relu,
    "exp": lambda x: (EXP_SLOPE * x).clamp(max=EXP_LIMIT).exp(),
    "elu_plus_one": lambda x: functional.elu(x) + 1,
}
FEATURES = tuple(_FEATURES)
#: Feature maps without negative values.
NON_NEGATIVE = ("relu", "exp", "elu_plus_one")


def feature_map(x: Float[Tensor, "*shape"], name: str) -> Float[Tensor, "*shape"]:
    """φ(x) in at least float32. "exp" is exp(0.2·x), constant where 0.2·x is above 20. Raises ArgumentError for a name
    that is not in FEATURES."""
    if name not in _FEATURES:
        raise unknown("feature", name, FEATURES)
    return _FEATURES[name](widened(x))


@dataclass(frozen=True, kw_only=True)
class Rule:
    """How features become weights; also the `Weighing` by which observers at the door see them.

    `normaliser`: "subtractive" or "divisive". `feature`: φ, one of FEATURES. `scale`: s, dim^-½ where None; as large
    as the number of keys it gives the paper's equation, which does not scale. `epsilon`: ε of the divisive rule."""

    normaliser: str = "subtractive"
    feature: str = "identity"
    scale: float | None = None
    epsilon: float = 1e-6

    def __post_init__(self) -> None:
        if self.normaliser not in NORMALISERS:
            raise unknown("normaliser", self.normaliser, NORMALISERS)
        if self.feature not in FEATURES:
            raise unknown("feature", self.feature, FEATURES)
        if self.normaliser == "divisive" and self.feature not in NON_NEGATIVE:
            raise ArgumentError(
                f"feature: got {self.feature!r} for the divisive normaliser, whose denominator would cross zero; "
                f"expected one of {', '.join(NON_NEGATIVE)}. Or take the subtractive normaliser."
            )
        if self.scale is not None and not self.scale > 0:
            raise ArgumentError(f"scale: got {self.scale}, expected more than 0, or None for dim ** -0.5.")
        if self.normaliser == "divisive" and not self.epsilon > 0:
            raise ArgumentError(f"epsilon: got {self.epsilon}, expected more than 0, such as 1e-6.")

    @property
    def name(self) -> str:
        return f"{self.normaliser} {self.feature}"

    @property
    def whole(self) -> bool:
        return True

    def scale_for(self, dim: int) -> float:
        return dim**-0.5 if self.scale is None else self.scale

    def products(
        self, query: Float[Tensor, "batch heads queries dim"], key: Float[Tensor, "batch kv_heads keys dim"]
    ) -> Float[Tensor, "batch heads queries keys"]:
        """a_ij, in at least float32, under autocast too."""
        features = feature_map(query, self.feature), feature_map(key, self.feature)
        with wide_sums(query):
            return grouped_scores(*features) * self.scale_for(query.shape[3])

    def __call__(
        self,
        logits: Float[Tensor, "batch heads rows keys"],
        visible: Bool[Tensor, "#batch #heads rows keys"],
        *,
        query: Float[Tensor, "batch heads rows dim"],
        key: Float[Tensor, "batch kv_heads keys dim"],
        positions: Tensor | None = None,
    ) -> Float[Tensor, "batch heads rows keys"]:
        """The weights of the rows. The scaled logits are a_ij where φ is the identity and of no use elsewhere."""
        products = logits if self.feature == "identity" else self.products(query, key)
        return self.weights_of(products, visible)

    def weights_of(
        self, products: Float[Tensor, "batch heads rows keys"], visible: Bool[Tensor, "#batch #heads rows keys"]
    ) -> Float[Tensor, "batch heads rows keys"]:
        """w_ij from a_ij; zero where not visible, and in rows that see nothing."""
        products = torch.where(visible, products, 0)
        count = visible.sum(-1, keepdim=True).clamp(min=1).to(products.dtype)
        total = products.sum(-1, keepdim=True)
        if self.normaliser == "subtractive":
            weights = (products - total / count + 1) / count
        else:
            weights = (products + self.epsilon) / (total + self.epsilon * count)
        return torch.where(visible, weights, 0)

    def output(self, product_value: Tensor, product: Tensor, value: Tensor) -> Tensor:
        """o_i from the means over what a row sees of a_ij v_j, a_ij and v_j."""
        if self.normaliser == "subtractive":
            return product_value + (1 - product) * value
        return (product_value + self.epsilon * value) / (product + self.epsilon)


INLINE = Rule()
LINEAR = Rule(normaliser="divisive", feature="relu")


def feature_weights(
    query: Float[Tensor, "batch heads queries dim"],
    key: Float[Tensor, "batch kv_heads keys dim"],
    *,
    rule: Rule = INLINE,
    visible: Bool[Tensor, "#batch #heads #queries keys"] | None = None,
) -> Float[Tensor, "batch heads queries keys"]:
    """The explicit weights, by their definition. For tests, plots and short inputs: memory is O(queries · keys)."""
    if visible is None:
        visible = torch.ones(1, 1, query.shape[2], key.shape[2], dtype=torch.bool, device=query.device)
    return rule.weights_of(rule.products(query, key), visible.expand(-1, -1, query.shape[2], -1))


def wide_sums(x: Tensor) -> torch.autocast:
    """A scope without autocast, which would take products of wide tensors in half precision."""
    return torch.autocast(x.device.type, enabled=False)


def widened(x: Tensor) -> Tensor:
    """x in at least float32."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
