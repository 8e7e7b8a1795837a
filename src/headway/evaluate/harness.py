"""A model of lm-evaluation-harness that runs every request with a method attached.

A harness scores a continuation c after a context x by log P(c | x). Here x is read in one forward and the tokens of c
one by one behind it, as generation would: methods that decide in prefill and methods that decide while decoding both
act where they would act. With `scoring="forward"` x and c are read in one forward, without a decoding step. Requests
run one at a time, so that a budget is a share of each request's own length and nothing is padded.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch import Tensor, nn
from tqdm import tqdm

from headway.door import Stage, use
from headway.door.stages import Driver
from headway.errors import ArgumentError, unknown
from headway.hosts import load
from headway.methods.budget import stages_at_budget

log = logging.getLogger(__name__)

SCORING = ("decode", "forward")
#: Tokens of context where a model does not say how many positions it has.
USUAL_LENGTH = 2048


@register_model("headway")
class HeadwayLM(TemplateLM):
    """`pretrained=smollm2,method=streaming-llm,budget=0.25`.

    pretrained: what `headway.load` takes, or a model with `tokenizer`. method: a slug of `headway papers` that has a
    budget, or "dense". budget: share of the keys in (0, 1]. tokens: length that the budget is a share of (None: that of
    each request). stages: stages of your own in place of `method`. scoring: "decode" or "forward", see the module.
    max_length: most tokens of a request, beyond which its beginning is cut off (None: the model's positions).

    Raises ArgumentError for what cannot be."""

    backend = "causal"

    def __init__(
        self,
        pretrained: Any = "smollm2",
        *,
        method: str = "dense",
        budget: float = 1.0,
        tokens: int | None = None,
        stages: Sequence[Stage] | None = None,
        tokenizer: Any = None,
        scoring: str = "decode",
        dtype: str = "float32",
        device: str | None = None,
        max_length: int | None = None,
        max_gen_toks: int = 256,
        batch_size: int | str | None = 1,
        max_batch_size: int | None = None,
        revision: str | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        super().__init__()
        if scoring not in SCORING:
            raise unknown("scoring", scoring, SCORING)
        if str(batch_size or 1) != "1":
            raise ArgumentError(
                f"batch_size: got {batch_size}, expected 1. A budget is a share of each request, and requests differ "
                "in length."
            )
        for name, value in (("max_length", max_length), ("max_gen_toks", max_gen_toks), ("tokens", tokens)):
            if value is not None and value < 1:
                raise ArgumentError(f"{name}: got {value}, expected at least 1.")
        if isinstance(pretrained, nn.Module):
            if tokenizer is None:
                raise ArgumentError("tokenizer: got none beside a model, expected its tokenizer.")
            self.model: Any = pretrained
        else:
            self.model, tokenizer = load(
                pretrained, dtype=dtype, device=_device(device), revision=revision,
                trust_remote_code=trust_remote_code,
            )  # fmt: skip
        self.tokenizer = tokenizer
        self.name = getattr(self.model, "name_or_path", "") or type(self.model).__name__
        self.method, self.budget, self.tokens, self.scoring = method, budget, tokens, scoring
        self.own_stages = None if stages is None else tuple(stages)
        self.max_gen_toks = int(max_gen_toks)
        text = self.model.config.get_text_config(decoder=True)
        self.max_length = max_length or getattr(text, "max_position_embeddings", None) or USUAL_LENGTH
        self._stages: dict[int, tuple[Stage, ...]] = {}
        self._density: list[tuple[float, int]] = []
        self._device = next(self.model.parameters()).device
        # Said now rather than at the first request: a method that is unknown, or a budget out of range.
        if any(isinstance(stage, Driver) for stage in self.stages(min(self.max_length, USUAL_LENGTH))):
            log.warning("%s wraps generation; log-likelihoods are those of dense attention.", method)

    def stages(self, tokens: int) -> tuple[Stage, ...]:
        """The stages for a request of so many tokens; made once for every length."""
        if self.own_stages is not None:
            return self.own_stages
        length = self.tokens or tokens
        if length not in self._stages:
            self._stages[length] = stages_at_budget(self.method, self.budget, tokens=length, model=self.model)
        return self._stages[length]

    @contextmanager
    def attached(self, tokens: int) -> Iterator[None]:
        """The method on the model for one request; notes what it read."""
        with use(self.model, *self.stages(tokens)) as handle, torch.no_grad():
            yield
        rows = handle.report()
        self._density.append((sum(r["density"] * r["calls"] for r in rows), sum(r["calls"] for r in rows)))

    @property
    def density(self) -> float:
        """Mean share of visible keys that was read so far, over all calls; 1 before anything ran."""
        calls = sum(count for _, count in self._density)
        return sum(total for total, _ in self._density) / calls if calls else 1.0

    def get_model_info(self) -> dict[str, Any]:
        """What the harness stores with its results."""
        own = None if self.own_stages is None else [repr(stage) for stage in self.own_stages]
        return {
            "model_name": self.name,
            "method": self.method if own is None else own,
            "budget": self.budget,
            "scoring": self.scoring,
            "density": self.density,
            "model_num_parameters": sum(p.numel() for p in self.model.parameters()),
            "model_dtype": str(next(self.model.parameters()).dtype),
        }

    @property
    def eot_token_id(self) -> int:
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """What stands before a continuation without context."""
        start = self.tokenizer.bos_token_id
        return self.eot_token_id if start is None else int(start)

    @property
    def tokenizer_name(self) -> str:
        return str(self.name).replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        return list(self.tokenizer.encode(string, add_special_tokens=bool(add_special_tokens)))

    def tok_decode(self, tokens: Any, skip_special_tokens: bool = True) -> str:
        return str(self.tokenizer.decode(tokens, skip_special_tokens=skip_special_tokens))

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        return str(
            self.tokenizer.apply_chat_template(
                chat_history,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )
        )

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        found = []
        for texts, context, continuation in tqdm(requests, disable=disable_tqdm, desc="log-likelihoods"):
            score = self.score(context, continuation)
            self.cache_hook.add_partial("loglikelihood", texts, score)
            found.append(score)
        return found

    def score(self, context: list[int], continuation: list[int]) -> tuple[float, bool]:
        """log P(continuation | context) under the method, and whether greedy decoding would produce it."""
        if len(continuation) > self.max_length:
            raise ArgumentError(
                f"continuation: got {len(continuation)} tokens, expected no more than the {self.max_length} of a "
                "request. Raise max_length."
            )
        context = context[-(self.max_length + 1 - len(continuation)) :]
        ids = self._ids([*context, *continuation])
        with self.attached(ids.shape[1]):
            logits = self._logits(ids, len(context))
        wanted = ids[0, len(context) :]
        logp = logits.float().log_softmax(-1)
        greedy = bool((logp.argmax(-1) == wanted).all())
        return float(logp.gather(1, wanted[:, None]).double().sum()), greedy

    def _logits(self, ids: Tensor, context: int) -> Tensor:
        """Logits that predict the tokens behind the context; the last token is not read."""
        count = ids.shape[1] - context
        if self.scoring == "forward":
            return self.model(input_ids=ids[:, :-1], logits_to_keep=count).logits[0, -count:]
        out = self.model(input_ids=ids[:, :context], use_cache=True, logits_to_keep=1)
        found = [out.logits[0, -1:]]
        for place in range(context, ids.shape[1] - 1):
            out = self.model(input_ids=ids[:, place : place + 1], past_key_values=out.past_key_values, use_cache=True)
            found.append(out.logits[0, -1:])
        return torch.cat(found)

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of whole texts, in windows of `max_length` tokens, each read in one forward."""
        found = []
        for request in tqdm(requests, disable=disable_tqdm, desc="texts"):
            (text,) = request.args
            windows = get_rolling_token_windows(
                token_list=self.tok_encode(text), prefix_token=self.prefix_token_id, max_seq_len=self.max_length,
                context_len=1,
            )  # fmt: skip
            total = 0.0
            for context, continuation in map(make_disjoint_window, windows):
                ids = self._ids([*context, *continuation])
                with self.attached(ids.shape[1]):
                    count = len(continuation)
                    logits = self.model(input_ids=ids[:, :-1], logits_to_keep=count).logits[0, -count:]
                logp = logits.float().log_softmax(-1)
                total += float(logp.gather(1, ids[0, -count:, None]).double().sum())
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), total)
            found.append(total)
        return found

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Text after each context, up to the first of its stop strings."""
        found = []
        end = self.tok_decode([self.eot_token_id], skip_special_tokens=False)
        for request in tqdm(requests, disable=disable_tqdm, desc="generations"):
            context, given = request.args
            options: dict[str, Any] = dict(normalize_gen_kwargs(given, self.max_gen_toks))
            stop = handle_stop_sequences(options.pop("until", None), eos=end)
            new = int(options.pop("max_gen_toks"))
            if not options.get("do_sample", False):
                options = {k: v for k, v in options.items() if k not in ("temperature", "top_k", "top_p", "min_p")}
            text = postprocess_generated_text(self._generate(context, new, stop, options), stop, None)
            self.cache_hook.add_partial("generate_until", (context, given), text)
            found.append(text)
        return found

    def _generate(self, context: str, new: int, stop: list[str], options: dict[str, Any]) -> str:
        room = self.max_length - new
        if room < 1:
            raise ArgumentError(
                f"max_gen_toks: got {new}, expected fewer than the {self.max_length} tokens of a request. Lower it, or "
                "raise max_length."
            )
        encoded = self.tok_encode(context) or [self.prefix_token_id]
        ids = self._ids(encoded[-room:])
        padding = self.tokenizer.pad_token_id
        with self.attached(ids.shape[1] + new):
            out = self.model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=new,
                pad_token_id=self.eot_token_id if padding is None else padding,
                stop_strings=[s for s in stop if s] or None,
                tokenizer=self.tokenizer,
                **options,
            )
        return self.tok_decode(out[0, ids.shape[1] :])

    def _ids(self, tokens: list[int]) -> Tensor:
        return torch.tensor([tokens], dtype=torch.long, device=self._device)


def _device(device: str | None) -> str:
    """The harness's command asks for the first GPU when nobody asked for anything."""
    if device is not None and device.startswith("cuda") and not torch.cuda.is_available():
        log.warning("device: got %r and no GPU here; runs on the CPU.", device)
        return "cpu"
    return device or "cpu"
