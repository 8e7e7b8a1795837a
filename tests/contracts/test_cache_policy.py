"""The cache-policy contract, tried on two plain policies: one that keeps everything, one that splits heads."""

from __future__ import annotations

import pytest
import torch

import headway
from headway.door.caches import PolicyCache, PolicyLayer, TokenStore, key_visible
from headway.door.stages import CachePolicy, Driver, Editor, Selector
from headway.errors import ConflictError
from tests.contracts import cache_policy as contract
from tests.door.hosts import CAUSAL, decoder

HOSTS = ["llama", "multi-query", "qwen3", "gpt2"]


class _Layer(PolicyLayer):
    def __init__(self, groups: list[list[int]], last: list[int | None]) -> None:
        super().__init__()
        self.groups, self.last = groups, last
        self.parts = [TokenStore() for _ in groups]

    @property
    def stores(self):
        return tuple(self.parts)

    def file(self, key, value, positions):
        for heads, store in zip(self.groups, self.parts, strict=True):
            store.append(key[:, heads], value[:, heads], positions)


class KeepLast(CachePolicy):
    """KV head 0 keeps everything, the others their last `last` tokens (None: everything)."""

    def __init__(self, last: int | None) -> None:
        self.last = last

    def make_cache(self, model):
        kv_heads = getattr(model.config, "num_key_value_heads", None) or model.config.num_attention_heads
        groups = [[0], list(range(1, kv_heads))] if kv_heads > 1 else [[0]]
        return PolicyCache(self, [_Layer(groups, [None, self.last]) for _ in range(model.config.num_hidden_layers)])

    def read(self, call):
        if call.forward.cache is None:
            return None
        layer = call.forward.cache.layers[call.module.layer_idx]
        parts = []
        for heads, store, last in zip(layer.groups, layer.parts, layer.last, strict=False):
            rows = torch.tensor([h * call.groups + g for h in heads for g in range(call.groups)])
            seen = key_visible(call.query_positions, store.positions, call.forward.padding)
            if last is not None:
                seen = seen & (store.positions[:, None, None] > call.query_positions[:, None] - last)
            parts.append(
                call.replace(
                    query=call.query[:, rows], key=store.key, value=store.value, mask=seen, causal=False,
                    key_at=store.positions[:, None], of_heads=rows, first_key=0, first_query=None,
                )
            )  # fmt: skip
        return parts

    def settle(self, cache):
        if self.last is not None:
            for layer in cache.layers:
                for store in layer.parts[1:]:
                    store.drop_middle(0, self.last)


@pytest.mark.parametrize("name", HOSTS)
def test_a_policy_that_keeps_everything_is_dense(name):
    contract.check_equals_dense(CAUSAL[name](), lambda: KeepLast(None))


@pytest.mark.parametrize("name", ["llama", "qwen3"])
@pytest.mark.parametrize(
    "check",
    [contract.check_causality, contract.check_requests_apart, contract.check_batch, contract.check_padding,
     contract.check_reorder_and_reset, contract.check_generate, contract.check_refuses_crop],
)  # fmt: skip
def test_a_policy_that_drops_meets_the_contract(name, check):
    check(CAUSAL[name](), lambda: KeepLast(5))


@pytest.mark.parametrize("check", contract.ONCE)
def test_a_policy_refuses_or_carries_what_it_is_used_with(check):
    check(CAUSAL["llama"](), lambda: KeepLast(5))


def test_logical_and_stored_length_are_told_apart():
    contract.check_lengths(decoder("Llama", num_key_value_heads=2), lambda: KeepLast(None), 24)
    model = decoder("Llama")
    with headway.use(model, KeepLast(4)) as handle, torch.no_grad():
        cache = model(input_ids=contract.tokens(1, 20), use_cache=True).past_key_values
        model(input_ids=contract.tokens(1, 1), past_key_values=cache)
    layer = cache.layers[0]
    assert cache.get_seq_length() == 21
    assert [store.length for store in layer.parts] == [21, 4]
    assert cache.stored_bytes() == 3 * (21 + 4) * 8 * 2 * 4
    assert {path for row in handle.report() for path in row["paths"]} == {"policy"}


def test_a_selector_of_the_other_phase_works_beside_a_policy():
    class Prefill(Selector):
        phases = frozenset({"prefill"})

        def select(self, call):
            return headway.door.Window(1, 4)

    class Decode(KeepLast):
        narrows = frozenset({"decode"})

        def read(self, call):
            return super().read(call) if call.forward.phase == "decode" else None

    model = decoder("Llama")
    with headway.use(model, Prefill(), Decode(3)) as handle, torch.no_grad():
        contract.run_in_chunks(model, contract.tokens(1, 12), [10, 1, 1])
    assert {tuple(sorted(row["paths"].items())) for row in handle.report()} == {(("policy", 2), ("window", 1))}
    with pytest.raises(ConflictError, match=r"KeepLast and Prefill.*selects keys in prefill"):
        headway.use(model, Prefill(), KeepLast(3)).attach()


def test_two_policies_or_two_drivers_or_a_blind_editor_are_refused():
    model = decoder("Llama")

    class Blind(Editor):
        def edit_weights(self, call, weights, rows):
            return weights

    class Drive(Driver):
        def generate(self, model, generate, *args, **kwargs):
            return generate(*args, **kwargs)

    with pytest.raises(ConflictError, match="two cache policies"):
        headway.use(model, KeepLast(3), KeepLast(4)).attach()
    with pytest.raises(ConflictError, match="two drivers"):
        headway.use(model, Drive(), Drive()).attach()
    with pytest.raises(ConflictError, match="Blind, which needs all keys"):
        headway.use(model, KeepLast(3), Blind()).attach()


def test_a_cache_that_was_filled_without_the_policy_is_refused():
    model = decoder("Llama")
    with torch.no_grad():
        cache = model(input_ids=contract.tokens(1, 6), use_cache=True).past_key_values
        with headway.use(model, KeepLast(3)), pytest.raises(ConflictError, match="filled without KeepLast"):
            model(input_ids=contract.tokens(1, 1), past_key_values=cache)


def test_a_driver_wraps_generate_and_leaves_no_trace():
    class Twice(Driver):
        def generate(self, model, generate, *args, **kwargs):
            return generate(*args, **kwargs), "driven"

    model = decoder("Llama")
    options = {"max_new_tokens": 2, "do_sample": False, "pad_token_id": 0}
    plain = model.generate(contract.tokens(1, 5), **options)
    with headway.use(model, Twice()):
        got, mark = model.generate(contract.tokens(1, 5), **options)
        assert mark == "driven"
        torch.testing.assert_close(got, plain)
    assert "generate" not in vars(model)
    torch.testing.assert_close(model.generate(contract.tokens(1, 5), **options), plain)


def test_a_selection_of_everything_runs_the_hosts_own_kernel():
    class Everything(Selector):
        def select(self, call):
            return headway.door.Dense()

    model = decoder("Llama")
    ids = contract.tokens(2, 9)
    with torch.no_grad():
        native = model(input_ids=ids).logits
        with headway.use(model, Everything()) as handle:
            assert torch.equal(model(input_ids=ids).logits, native)
    assert {path for row in handle.report() for path in row["paths"]} == {"native"}
