"""Methods under the tasks of lm-evaluation-harness: the harness's own command with a model named `headway`.

    python -m headway.evaluate run --model headway --model_args pretrained=smollm2,method=streaming-llm,budget=0.25 …

The harness looks for models only in its own table, so `register` has to run first; this module's command does that.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

from headway.errors import missing_extra


def register() -> type[Any]:
    """Makes `--model headway` known to the harness and returns its class.

    Raises MissingExtraError where lm-eval is not installed."""
    if importlib.util.find_spec("lm_eval") is None:
        raise missing_extra("lm-eval", "eval", "running tasks of lm-evaluation-harness")
    return importlib.import_module("headway.evaluate.harness").HeadwayLM
