"""Models built of any registered mixer, as `transformers` models: a causal language model, an image classifier, and a
causal stack over numbers.

    from headway.models import HeadwayConfig, HeadwayForCausalLM
    model = HeadwayForCausalLM(HeadwayConfig(vocab_size=512, width=128, layers=4, heads=4, mixer="lightning"))

They save, load and generate as every other host does, and their attention passes the door.
"""

from __future__ import annotations

from headway.models.cache import HeadwayCache
from headway.models.config import HeadwayConfig, HeadwayRegressionConfig, HeadwayViTConfig
from headway.models.language import HeadwayForCausalLM
from headway.models.mixers import mixers
from headway.models.regression import HeadwayRegression
from headway.models.vision import HeadwayViT, image_processor

__all__ = [
    "HeadwayCache",
    "HeadwayConfig",
    "HeadwayForCausalLM",
    "HeadwayRegression",
    "HeadwayRegressionConfig",
    "HeadwayViT",
    "HeadwayViTConfig",
    "image_processor",
    "mixers",
]


def register() -> None:
    """Makes the classes known to `AutoConfig`, `AutoModelForCausalLM`, `AutoModelForImageClassification`, and
    `AutoModel`, which gives each with its head."""
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForImageClassification

    for config, model in (
        (HeadwayConfig, HeadwayForCausalLM),
        (HeadwayViTConfig, HeadwayViT),
        (HeadwayRegressionConfig, HeadwayRegression),
    ):
        AutoConfig.register(config.model_type, config, exist_ok=True)
        AutoModel.register(config, model, exist_ok=True)
    AutoModelForCausalLM.register(HeadwayConfig, HeadwayForCausalLM, exist_ok=True)
    AutoModelForImageClassification.register(HeadwayViTConfig, HeadwayViT, exist_ok=True)


register()
