"""The Recycled Attention recipe at smoke size, its planted processes, and that its measurements can fail."""

from __future__ import annotations

import pytest
import torch

import headway
from headway.evidence import Context, NotRunnableError, load_recipe, prove
from headway.evidence.recipes import _recycled_chain as taught
from headway.evidence.recipes import _recycled_decoding as decoding
from headway.evidence.recipes import _recycled_mass as mass
from headway.evidence.recipes import _recycled_toys as toys
from headway.evidence.recipes import recycled_attention as recipe
from headway.evidence.recipes._recycled_claims import trained_chain_claim
from headway.methods.long_context.recycled_attention import RecycledAttention, recovered_mass


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    return prove("recycled-attention", size="smoke", seed=3, out=tmp_path_factory.mktemp("runs"), show_progress=False)


def claim(run, name):
    return next(found for found in run.claims if found.id == name)


def context(tmp_path) -> Context:
    return Context(size="smoke", seed=0, out=tmp_path)


def test_every_planned_claim_is_measured(smoke):
    assert [found.id for found in smoke.claims] == list(recipe.CRITERIA)
    assert smoke.planned


def test_a_random_model_on_few_tokens_proves_nothing(smoke):
    for name in ("recovers-mass", "mass-falls-with-stride", "agrees-with-dense"):
        assert claim(smoke, name).verdict == "inconclusive"


def test_every_method_decodes_the_same_tokens(smoke):
    table = claim(smoke, "close-to-dense").details
    assert list(table["perplexity"]) == list(decoding.arms(16))
    assert table["full steps, mean over layers"]["recycled"] == 1
    assert table["full steps, mean over layers"]["one choice"] == 0


def test_mass_is_told_by_steps_since_the_full_one(smoke):
    details = claim(smoke, "recovers-mass").details
    for name in ("recycled", "streaming"):
        curve = details[f"{name} by steps since"]
        assert len(curve) == max(recipe.STRIDES) - 1
        assert all(0 < mass <= 1 for mass in curve)


def test_planted_chains_are_followed_by_what_renews_its_choice(smoke):
    found = claim(smoke, "chain-of-keys")
    shares = found.details["share of hops right"]
    assert shares["dense"] == shares["4"] == shares["dynamic"] == 1
    # One choice knows the first hop, which is what the prompt asked for.
    assert shares["one choice"] == pytest.approx(1 / recipe.SMOKE.hops)


def test_one_choice_knows_the_first_link_of_a_chain_and_no_later_one(smoke):
    by_hop = claim(smoke, "chain-by-length").details["share right by hop"]
    assert by_hop["one choice"] == [1.0, 0.0, 0.0, 0.0]
    assert by_hop["4"] == by_hop["dense"] == [1.0] * 4


def test_sets_that_nothing_renews_hold_as_many_keys_and_what_came_since():
    scores = torch.tensor([[[0.1, 0.9, 0.3, 0.8, 0.2]]])
    held = mass.held_since(scores, torch.tensor([5, 8]), 9, 4)
    assert held.sum(-1).tolist() == [[[4, 4]]]
    # One token since the prompt and three of its best; then the two latest and the two best.
    assert held[0, 0, 0].nonzero()[:, 0].tolist() == [1, 2, 3, 5]
    assert held[0, 0, 1].nonzero()[:, 0].tolist() == [1, 3, 7, 8]


def test_heavy_hitters_are_the_older_keys_that_received_most():
    received = torch.tensor([[[5.0, 1.0, 4.0, 3.0, 9.0, 8.0]]])
    held = mass.heavy_and_recent(received, torch.tensor([5, 6]), 7, 4)
    assert [row.nonzero()[:, 0].tolist() for row in held[0, 0]] == [[0, 2, 4, 5], [0, 4, 5, 6]]


def test_recovered_mass_is_that_of_the_parallel_form(tmp_path):
    """The set of a full step is the one of `recovered_mass`, and a set of every key holds all there is."""
    from headway.hosts.tiny import tiny_host

    model, _ = tiny_host("llama", max_position_embeddings=200)
    ids = torch.randint(8, 100, (1, 120), generator=torch.Generator().manual_seed(0))
    found = mass.mass_of_sets(context(tmp_path), model, ids, starts=1, steps=9, budget=20, rivals=True)
    start = found["starts"][0]
    with headway.capture(model, what=("weights",)) as captured, torch.no_grad():
        model(input_ids=ids, use_cache=False)
    layers = [captured.result()[layer]["weights"] for layer in range(model.config.num_hidden_layers)]
    rows = [weights[:, :, start : start + 10, : start + 10] for weights in layers]
    kv_heads = model.config.num_key_value_heads
    want = torch.stack([recovered_mass(row, kv_heads, 20).mean((0, 1)) for row in rows]).mean(0)
    torch.testing.assert_close(torch.tensor(found["recycled"][0]), want, atol=1e-5, rtol=0)
    whole = mass.mass_of_sets(context(tmp_path), model, ids, starts=1, steps=9, budget=400, rivals=True)
    for name in (*mass.OWN, "one choice", "snapkv", "h2o", "random"):
        torch.testing.assert_close(torch.tensor(whole[name]), torch.ones(1, 9), atol=1e-5, rtol=0)


def test_snapkv_chooses_by_the_last_rows_of_the_prompt_and_never_again():
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(1, 2, 60, 8, generator=generator) for _ in range(2))
    attention = toys.LayerByHand(decoding.SnapKV(budget=40))
    attention(query, key, key)
    call = headway.door.AttentionCall.from_tensors(query, key, key, causal=True)
    sums = call.weights(torch.arange(28, 60)).sum(2)
    pooled = torch.nn.functional.max_pool1d(sums, 7, stride=1, padding=3)[..., :28]
    best = pooled.topk(8).values.min(-1).values
    layer = attention.cache.layers[0]
    for head in range(2):
        held = set(layer.small.positions[0, head].tolist())
        assert set(range(28, 60)) <= held
        assert all(pooled[0, head, i] >= best[0, head] for i in held if i < 28)
    for _ in range(30):
        attention(query[:, :, -1:], key[:, :, -1:], key[:, :, -1:])
    assert int(layer.full_steps.sum()) == 0


def test_a_dense_step_by_hand_is_attention_over_everything():
    attention = toys.LayerByHand(RecycledAttention(budget=4, stride=1))
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, 2, 9, 8, generator=generator) for _ in range(3))
    outputs = [attention(query[:, :, i : i + 1], key[:, :, i : i + 1], value[:, :, i : i + 1]) for i in range(9)]
    want = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
    torch.testing.assert_close(torch.stack(outputs, 2), want, atol=1e-5, rtol=0)


def test_a_method_that_never_renews_fails_the_chain(tmp_path, monkeypatch):
    monkeypatch.setattr(RecycledAttention, "_due", lambda self, query, layer: torch.zeros(1, dtype=torch.bool))
    shares = toys.chains(context(tmp_path), 1, 4)
    assert shares["4"] == [[True, False, False, False]]


def test_short_strides_recover_what_long_ones_lose(tmp_path):
    found = toys.planted_drift(context(tmp_path), 2)
    means = [sum(found[str(stride)]) for stride in toys.PLANTED_STRIDES]
    assert means == sorted(means, reverse=True)
    assert max(found["one choice"]) < 0.35
    assert max(found["random"]) < 0.1


def test_bursts_have_as_many_full_steps_on_both_sides(tmp_path):
    found = toys.bursty_drift(context(tmp_path), 2)
    assert all(full > 3 for full in found["full"])
    assert set(found) == {"dynamic", "fixed", "full"}


def test_the_curve_is_drawn(smoke):
    assert (smoke.folder / "plots" / "recovered-mass.html").exists()


def test_the_paper_setting_needs_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(NotRunnableError, match="no GPU"):
        load_recipe("recycled-attention").check_runnable("full")
    load_recipe("recycled-attention").check_runnable("small")


@pytest.mark.parametrize("size", [4, taught.NAMES])
def test_the_facts_of_a_taught_chain_make_one_ring(size):
    batch = taught.chain_batch(20, torch.Generator().manual_seed(0), size)
    for facts, names in zip(batch.facts.tolist(), batch.names.tolist(), strict=True):
        pairs = dict(facts)
        assert len(pairs) == size
        assert [pairs[name] for name in names[:-1]] == names[1:]
        at = names[0]
        assert len({at := pairs[at] for _ in range(size)}) == size


def test_every_token_of_a_taught_answer_is_asked_for_the_next_name(monkeypatch):
    """A model that reads the ring off the facts has no loss, and one that names the name itself has no right answer."""
    batch = taught.chain_batch(3, torch.Generator().manual_seed(1))
    answers = taught._answers(Oracle(), batch).argmax(-1)
    assert torch.equal(answers, taught._wanted(batch))
    assert not bool((taught._answers(Oracle(lost_at=range(99)), batch).argmax(-1) == taught._wanted(batch)).any())


class Oracle:
    """Reads the ring off the embedded facts; at tokens `lost_at`, counted from the first name, it says that name."""

    def __init__(self, lost_at=()):
        self.lost_at, self.seen = set(lost_at), 0

    def get_input_embeddings(self):
        return lambda ids: torch.nn.functional.one_hot(ids, taught.VOCABULARY).float()

    def __call__(self, input_ids=None, inputs_embeds=None, **_):
        if inputs_embeds is not None:
            keys, values, names = (
                inputs_embeds[..., start : start + taught.NAMES] for start in (taught.KEY, taught.VALUE, taught.NAME)
            )
            facts = (keys.sum(-1) * values.sum(-1) * inputs_embeds.sum(-1) == 2).nonzero()[:, 1].unique()
            self.ring = torch.einsum("bfk,bfv->bkv", keys[:, facts], values[:, facts]).argmax(-1)
            names = names[:, facts[-1] + 1 :].argmax(-1)
        else:
            names = input_ids - taught.NAME
        lost = torch.tensor([self.seen + i in self.lost_at for i in range(names.shape[1])])
        self.seen += names.shape[1]
        said = torch.where(lost, names, self.ring.gather(1, names))
        logits = torch.nn.functional.one_hot(taught.NAME + said, taught.VOCABULARY).float()
        return type("Output", (), {"logits": logits, "past_key_values": None})()


def test_a_wrong_link_is_followed_and_counted_wrong():
    batch = taught.chain_batch(4, torch.Generator().manual_seed(2))
    assert bool(taught.followed(Oracle(), batch).all())
    # Only the last token of an answer is listened to.
    assert bool(taught.followed(Oracle(lost_at=[0, 1, taught.SPELLING]), batch).all())
    found = taught.followed(Oracle(lost_at=[2 * taught.SPELLING - 1]), batch)
    assert found.tolist() == [[True] + [False] * (taught.HOPS - 1)] * 4


def test_decoding_a_taught_chain_densely_is_the_parallel_form():
    """What `followed` hears step by step is what the training loss sees at the last token of each answer."""
    model = taught.trained(1, torch.Generator().manual_seed(0))
    batch = taught.chain_batch(6, torch.Generator().manual_seed(3))
    with torch.no_grad():
        first = taught._answers(model, batch).argmax(-1)[:, taught.SPELLING - 1]
    assert torch.equal(taught.followed(model, batch)[:, 0], first == batch.names[:, 1])


@pytest.mark.parametrize(
    ("changed", "verdict"),
    [({}, "holds"), ({"4": 0.5}, "fails"), ({"one choice": 0.9}, "fails"), ({"dense": 0.5}, "inconclusive")],
)
def test_a_taught_chain_is_judged_by_every_arm(tmp_path, changed, verdict):
    right = {"dense": 1.0, "4": 1.0, "dynamic": 1.0, "one choice": 0.1, "streaming": 0.0} | changed
    toys_found = [{name: [[i < 10 * share for i in range(10)]] for name, share in right.items()}] * 3
    found = trained_chain_claim(context(tmp_path), toys_found, recipe.CRITERIA["trained-chain"])
    assert found.verdict == verdict


def test_the_tokens_that_lose_most_are_told_from_the_others():
    note = decoding._rise_note([[1.0] * 10, [2.0] * 10], [[1.0] * 9 + [3.0], [2.0] * 9 + [3.0]])
    assert "by text: 1.22, 1.11" in note
    assert "lose 1.50 nats each, the others 0.00" in note
