"""The analysis on real decoders: a Llama with planted sinks, and tiny random hosts of other families."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from headway.door import capture
from headway.errors import ArgumentError, HeadwayError, HostError, NumericError
from headway.methods.sinks.secondary_sinks import (
    SecondarySinks,
    analyse,
    analyse_rows,
    detect,
    lifetime_law,
    read_streams,
    rescale_writes,
)
from headway.methods.sinks.secondary_sinks.structure import find_blocks, find_mlp, find_structure
from headway.methods.sinks.secondary_sinks.triggers import contrast_positions, has_tsne
from headway.tasks.planted_sinks import PlantedSinks, planted_sinks

TOKENS = 96
SINKS = 9


@pytest.fixture(scope="module")
def planted() -> PlantedSinks:
    return planted_sinks(seed=0)


@pytest.fixture(scope="module")
def text(planted: PlantedSinks) -> tuple[torch.Tensor, dict[int, int]]:
    return planted.text(TOKENS, sinks=SINKS, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def found(planted: PlantedSinks, text: tuple[torch.Tensor, dict[int, int]]) -> SecondarySinks:
    return analyse(planted.model, text[0], received=received_by(planted.model, text[0]))


def received_by(model: nn.Module, ids: torch.Tensor) -> list[torch.Tensor]:
    with capture(model, what=("received", "visible")) as handle:
        model(input_ids=ids)
    result = handle.result()
    return [(result[i]["received"] / result[i]["visible"])[0] for i in range(len(result))]


def whole_streams(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """Every block's output, the plain way: all of it kept."""
    kept: list[torch.Tensor] = []
    hooks = [
        block.register_forward_hook(lambda m, a, out: kept.append(out if isinstance(out, torch.Tensor) else out[0]))
        for _, block in find_blocks(model)
    ]
    with torch.no_grad():
        model(input_ids=ids)
    for hook in hooks:
        hook.remove()
    return torch.stack([x[0] for x in kept])


@pytest.mark.parametrize("seed", [1, 2])
def test_planted_sinks_are_found_at_their_layer_and_nothing_else_is(seed: int):
    planted = planted_sinks(seed=seed)
    ids, truth = planted.text(TOKENS, sinks=SINKS, generator=torch.Generator().manual_seed(seed))
    sinks = analyse(planted.model, ids, key_value=False).sinks
    assert {s.position: s.start for s in sinks.sinks} == truth
    assert (sinks.primary.position, sinks.primary.start, sinks.primary.end) == (0, planted.start, planted.end)
    assert {s.label for s in sinks.sinks} == {"secondary"}


def test_planted_lifetimes_are_within_a_tenth_of_the_law(planted: PlantedSinks, found: SecondarySinks):
    for creation in planted.creations:
        law = lifetime_law(creation.norm, planted.write_norm, before=creation.before)
        lives = [s.lifetime for s in found.sinks.sinks if s.start == creation.layer]
        assert len(lives) == SINKS
        assert sum(lives) / len(lives) == pytest.approx(law, rel=0.1)


def test_same_ids_without_the_flag_stay_clean(planted: PlantedSinks, text: tuple, found: SecondarySinks):
    ids, truth = text
    triggers = [c.token_id for c in planted.creations]
    same = [t for t in range(TOKENS) if int(ids[0, t]) in triggers and t not in truth]
    assert len(same) == 2 * SINKS
    assert not set(same) & set(found.sinks.positions())


def test_streaming_finds_what_whole_streams_give(planted: PlantedSinks, text: tuple, found: SecondarySinks):
    hidden = whole_streams(planted.model, text[0])
    assert detect(hidden).sinks == found.sinks.sinks
    primary = hidden[:, 0].norm(dim=-1).tolist()
    assert found.norms["hidden"]["primary"] == pytest.approx(primary, rel=1e-5)


def test_the_mlp_turns_unlike_inputs_into_the_primarys_direction(planted: PlantedSinks, found: SecondarySinks):
    assert set(found.stages) == {c.layer for c in planted.creations}
    for stages in found.stages.values():
        assert list(stages) == ["input", "gate", "up", "act", "product", "down"]
        assert stages["input"] < 0.5
        assert stages["product"] < 0.5
        assert stages["down"] > 0.98
    assert all(o.aligned and abs(o.to_stream) > 0.98 and abs(o.to_source) > 0.98 for o in found.origins)
    norms = {o.layer: o.write_norm for o in found.origins}
    assert norms == pytest.approx({c.layer: c.norm for c in planted.creations}, rel=0.02)


def test_the_flag_in_the_attention_output_is_the_trigger(planted: PlantedSinks, found: SecondarySinks):
    trigger = found.triggers[0]
    assert (trigger.layer, trigger.sinks, trigger.others) == (planted.creations[0].layer, SINKS, SINKS)
    assert trigger.spaces["attention"].separation == 1.0
    assert trigger.spaces["attention"].variance[0] > 0.99
    probes = [p for p in trigger.probes if p.component == 0 and p.scale == 8]
    fired = [p for p in probes if p.norm > 10]
    assert len(probes) == 2
    assert [p.cosine > 0.98 for p in fired] == [True]
    assert all(p.norm < 2 for p in trigger.probes if p.component > 0)


def test_secondary_sinks_take_attention_that_the_primary_loses(planted: PlantedSinks, found: SecondarySinks):
    first = planted.creations[0].layer
    alive = range(first + 1, planted.creations[1].layer)
    assert all(found.score["secondary_alive"][i] > 2 * found.score["rest"][i] for i in alive)
    assert found.score["primary"][first + 1] < found.score["primary"][planted.start + 1]


def test_a_result_is_ready_for_strict_json(found: SecondarySinks):
    data = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert data["primary"]["position"] == 0
    assert data["score"]["bos_sink"] == [None] * 16
    assert data["stages"][str(found.origins[0].layer)]["down"] > 0.98
    assert len(data["norms"]["key"]["rest"]) == len(data["entropy"]) == 16


def test_key_and_value_norms_come_from_every_layer(planted: PlantedSinks, text: tuple, found: SecondarySinks):
    attention = planted.model.model.layers[4].self_attn
    caught: list[torch.Tensor] = []
    hook = attention.k_proj.register_forward_hook(lambda m, a, out: caught.append(out))
    with torch.no_grad():
        planted.model(input_ids=text[0])
    hook.remove()
    by_head = caught[0].view(TOKENS, -1, attention.head_dim).norm(dim=-1).mean(1)
    assert found.norms["key"]["primary"][4] == pytest.approx(by_head[0].item(), rel=1e-4)


def test_one_forward_made_elsewhere_serves_the_analysis(planted: PlantedSinks, text: tuple, found: SecondarySinks):
    ids, _ = text
    with read_streams(planted.model, ids) as reading, torch.no_grad():
        planted.model(input_ids=ids)
    result = analyse_rows(planted.model, ids, reading=reading)[0]
    assert result.sinks == found.sinks
    assert result.entropy == found.entropy


def test_a_reading_of_another_text_or_without_a_forward_is_refused(planted: PlantedSinks, text: tuple):
    ids, _ = text
    with read_streams(planted.model, ids[:, :50], key_value=False) as reading, torch.no_grad():
        planted.model(input_ids=ids[:, :50])
    with pytest.raises(ArgumentError, match="another text"):
        analyse_rows(planted.model, ids, reading=reading)
    with pytest.raises(ArgumentError, match="other candidate positions"):
        analyse_rows(planted.model, ids[:, :50], reading=reading, chat_template=True)
    with pytest.raises(HostError, match="expected each of 16 once"), read_streams(planted.model, ids, key_value=False):
        pass


def test_rows_of_a_batch_are_analysed_on_their_own_and_padding_is_left_out(planted: PlantedSinks):
    one, _ = planted.text(TOKENS, sinks=SINKS, generator=torch.Generator().manual_seed(5))
    two, _ = planted.text(60, sinks=4, generator=torch.Generator().manual_seed(6))
    for side in ("left", "right"):
        pad = torch.full((1, TOKENS - 60), 9)
        zeros, ones = torch.zeros(1, TOKENS - 60), torch.ones(1, 60)
        order = slice(None) if side == "left" else slice(None, None, -1)
        ids = torch.cat([one, torch.cat([pad, two][order], 1)])
        mask = torch.cat([torch.ones(1, TOKENS), torch.cat([zeros, ones][order], 1)]).long()
        rows = analyse_rows(planted.model, ids, mask)
        alone = [analyse(planted.model, one), analyse(planted.model, two)]
        assert [r.sinks for r in rows] == [r.sinks for r in alone]
        for row, single in zip(rows, alone, strict=True):
            for kind in ("hidden", "key", "value"):
                assert row.norms[kind]["rest"] == pytest.approx(single.norms[kind]["rest"], rel=1e-3)


def test_received_attention_is_read_in_the_columns_of_the_given_row(planted: PlantedSinks):
    two, _ = planted.text(60, sinks=4, generator=torch.Generator().manual_seed(6))
    ids = torch.cat([torch.full((1, 4), 9), two], 1)
    mask = torch.cat([torch.zeros(1, 4), torch.ones(1, 60)], 1).long()
    columns = torch.arange(64.0).expand(16, -1)
    score = analyse(planted.model, ids, mask, received=list(columns), key_value=False).score
    assert score["primary"] == [4.0] * 16


def test_a_model_without_sinks_says_so():
    model = tiny("llama")
    result = analyse(model, torch.randint(0, 60, (1, 20), generator=torch.Generator().manual_seed(0)))
    assert result.primary is None
    assert result.reason.startswith("no primary sink found")
    assert result.sinks.sinks == ()
    assert result.levels.total == 0
    assert result.references == {}
    json.dumps(result.to_dict(), allow_nan=False)


def test_sinks_of_an_earlier_range_are_pointed_out_and_can_be_traced(planted: PlantedSinks, text: tuple):
    """A second, larger rise of the first token hides the first range from the paper's rule."""
    ids, truth = text
    direction = planted.direction

    def pushed(amount: float) -> Any:
        return lambda module, args, output: output + amount * direction * (torch.arange(TOKENS) == 0)[:, None]

    layers = planted.model.model.layers
    hooks = [layers[at].register_forward_hook(pushed(by)) for at, by in ((7, -200.0), (9, 5000.0), (13, -5020.0))]
    try:
        main = analyse(planted.model, ids, key_value=False)
        assert (main.primary.start, main.primary.end) == (9, 13)
        earlier = [(r.primary.start, r.primary.end) for r in main.other_ranges]
        assert earlier == [(1, 7)]
        assert any("layers 1 to 6" in note and "span=(1, 7)" in note for note in main.notes)
        traced = analyse(planted.model, ids, key_value=False, span=(1, 7))
    finally:
        for hook in hooks:
            hook.remove()
    first = planted.creations[0].layer
    assert {s.position: s.start for s in traced.sinks.sinks} == {t: at for t, at in truth.items() if at == first}
    assert traced.stages[first]["down"] > 0.98


def test_a_larger_norm_outside_the_candidates_is_pointed_out(planted: PlantedSinks, text: tuple):
    shifted = torch.cat([torch.tensor([[20, 21]]), text[0]], 1)
    plain = analyse(planted.model, shifted, key_value=False)
    assert plain.primary is None
    assert any("chat_template=True" in note for note in plain.notes)
    chat = analyse(planted.model, shifted, key_value=False, chat_template=True)
    assert chat.primary.position == 2
    assert not any("chat_template" in note for note in chat.notes)


def test_contrast_tokens_share_the_ids_and_are_drawn_with_the_seed():
    ids = torch.tensor([7, 3, 3, 5, 3, 3, 5, 3, 9])
    chosen = contrast_positions(ids, [1, 3], [2], seed=1)
    assert len(chosen) == 2
    assert set(chosen) <= {4, 5, 6, 7}
    assert chosen == contrast_positions(ids, [1, 3], [2], seed=1)
    assert len({tuple(contrast_positions(ids, [1, 3], [2], seed=s)) for s in range(8)}) > 1
    assert contrast_positions(ids, [0], []) == []


def test_too_few_tokens_for_triggers_and_a_missing_tsne_are_told(planted: PlantedSinks):
    ids, _ = planted.text(40, sinks=3, generator=torch.Generator().manual_seed(0))
    result = analyse(planted.model, ids, key_value=False, tsne=True)
    assert result.triggers == []
    assert any("3 sinks and 3 other tokens" in note for note in result.notes)
    assert has_tsne() or any("needs scikit-learn" in note for note in result.notes)


def test_a_sample_of_the_sinks_is_traced(planted: PlantedSinks, text: tuple):
    result = analyse(planted.model, text[0], key_value=False, sample=4)
    assert len(result.origins) == 4 * len(planted.creations)
    assert result.levels.total == SINKS * len(planted.creations)


def test_progress_is_told_and_gradients_and_modes_are_left_alone(planted: PlantedSinks, text: tuple):
    calls: list[tuple[int, int, str]] = []
    planted.model.train()
    planted.model.model.layers[2].eval()
    modes = [m.training for m in planted.model.modules()]
    hooks = count_hooks(planted.model)
    analyse(planted.model, text[0], progress=lambda *call: calls.append(call))
    assert [m.training for m in planted.model.modules()] == modes
    assert count_hooks(planted.model) == hooks
    assert calls[:16] == [(i + 1, 16, "reading the stream") for i in range(16)]
    assert calls[16:] == [(1, 2, "reading the MLPs"), (2, 2, "reading the MLPs")]
    assert all(p.grad is None for p in planted.model.parameters())
    planted.model.eval()


def count_hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_removing_a_write_removes_its_sinks_and_touches_nothing_else_there(
    planted: PlantedSinks, text: tuple, found: SecondarySinks
):
    ids, truth = text
    layer = planted.creations[0].layer
    mine = [t for t, at in truth.items() if at == layer]
    others = [t for t in range(TOKENS) if t not in mine]
    with rescale_writes(planted.model, layer, found.references[layer], 0.0) as touched:
        after = whole_streams(planted.model, ids)
        received = torch.stack([x.mean(0) for x in received_by(planted.model, ids)])
    before = whole_streams(planted.model, ids)
    assert touched.positions == mine
    assert touched.norms[: len(mine)] == pytest.approx([planted.creations[0].norm] * len(mine), rel=0.02)
    assert not set(detect(after).positions()) & set(mine)
    assert torch.equal(after[layer][others], before[layer][others])
    rest = [t for t in others if t > 3 and t not in truth]
    assert received[layer + 1 : planted.end][:, mine].mean() < 1.2 * received[layer + 1 : planted.end][:, rest].mean()


def test_larger_writes_live_longer_and_take_more_attention(planted: PlantedSinks, text: tuple, found: SecondarySinks):
    ids, truth = text
    layer = planted.creations[0].layer
    mine = [t for t, at in truth.items() if at == layer]
    lives, scores = [], []
    for norm in (10.8, 11.5, 12.2):
        with rescale_writes(planted.model, layer, found.references["source"], norm):
            sinks = detect(whole_streams(planted.model, ids))
            received = torch.stack([x.mean(0) for x in received_by(planted.model, ids)])
        lives.append(sum(s.lifetime for s in sinks.sinks if s.position in mine))
        scores.append(received[layer + 1 : planted.end][:, mine].mean().item())
    assert lives == sorted(set(lives))
    assert scores == sorted(set(scores))


def test_the_measured_norm_is_the_identity(planted: PlantedSinks, text: tuple, found: SecondarySinks):
    layer = planted.creations[0].layer
    position, norm = next((o.position, o.write_norm) for o in found.origins if o.layer == layer)
    ids = text[0][:, : position + 1]
    before = whole_streams(planted.model, ids)
    with rescale_writes(planted.model, layer, found.references[layer], norm) as touched:
        after = whole_streams(planted.model, ids)
    assert position in touched.positions
    assert torch.allclose(after[:, position], before[:, position], rtol=1e-4, atol=1e-4)


def test_an_intervention_ends_with_its_scope_even_after_an_exception(planted: PlantedSinks, text: tuple, found: Any):
    hooks, before = count_hooks(planted.model), whole_streams(planted.model, text[0])
    with pytest.raises(RuntimeError, match="stop"), rescale_writes(planted.model, 3, found.references["source"], 0.0):
        raise RuntimeError("stop")
    assert count_hooks(planted.model) == hooks
    assert torch.equal(whole_streams(planted.model, text[0]), before)


def test_the_first_positions_are_never_rescaled(planted: PlantedSinks, found: SecondarySinks):
    ids = torch.tensor([[0, 1, 2, 2, 20, 2]])
    layer = planted.creations[0].layer
    with rescale_writes(planted.model, layer, found.references["source"], 0.0) as touched:
        planted.model(input_ids=ids)
    assert touched.positions == [3, 5]
    with rescale_writes(planted.model, layer, found.references["source"], 0.0, skip=0) as touched:
        planted.model.model(input_ids=ids)
    assert touched.positions == [0, 2, 3, 5]


def test_an_intervention_knows_positions_with_padding_and_with_a_cache(planted: PlantedSinks, found: SecondarySinks):
    layer, source = planted.creations[0].layer, found.references["source"]
    ids = torch.tensor([[9, 9, 0, 1, 2, 2, 20, 2]])
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1]])
    with torch.no_grad(), rescale_writes(planted.model, layer, source, 0.0) as touched:
        planted.model(input_ids=ids, attention_mask=mask)
    assert touched.positions == [3, 5]
    cache = transformers.DynamicCache(config=planted.model.config)
    with torch.no_grad(), rescale_writes(planted.model, layer, source, 0.0) as touched:
        for token in (0, 1, 2, 2, 20, 2):
            planted.model(input_ids=torch.tensor([[token]]), past_key_values=cache, use_cache=True)
    assert touched.positions == [3, 5]


@pytest.mark.parametrize(
    ("layer", "reference", "norm", "message"),
    [
        (16, torch.ones(64), 1.0, "layer: got 16"),
        (3, torch.ones(64), -1.0, "norm: got -1.0"),
        (3, torch.zeros(64), 1.0, "one vector with a length"),
        (3, torch.ones(2, 64), 1.0, "one vector with a length"),
    ],
)
def test_an_unusable_intervention_is_refused(
    planted: PlantedSinks, layer: int, reference: torch.Tensor, norm: float, message: str
):
    with pytest.raises(ArgumentError, match=message), rescale_writes(planted.model, layer, reference, norm):
        pass


def test_a_reference_of_another_width_is_refused_in_the_forward(planted: PlantedSinks, text: tuple):
    with (
        pytest.raises(ArgumentError, match="got width 32, expected 64"),
        rescale_writes(planted.model, 3, torch.ones(32), 1.0),
    ):
        planted.model(input_ids=text[0])
    planted.model(input_ids=text[0])


def test_more_than_one_text_needs_the_batch_form(planted: PlantedSinks, text: tuple):
    with pytest.raises(ArgumentError, match="got 2 rows, expected one text"):
        analyse(planted.model, text[0].repeat(2, 1))


@pytest.mark.parametrize(
    ("ids", "mask", "message"),
    [
        (torch.ones(1, 8), None, "expected token ids as an integer tensor"),
        ([1, 2, 3], None, "got list"),
        (torch.ones(1, 8, dtype=torch.long), torch.ones(1, 7), "attention_mask: got shape"),
        (torch.ones(1, 2, dtype=torch.long), None, "text of 2, expected at least 3"),
        (torch.ones(1, 0, dtype=torch.long), None, "text of 0"),
        (torch.ones(1, 8, dtype=torch.long), torch.tensor([[0] * 7 + [1]]), "text of 1"),
    ],
)
def test_unusable_texts_are_refused_with_a_reason(planted: PlantedSinks, ids: Any, mask: Any, message: str):
    with pytest.raises(ArgumentError, match=message):
        analyse(planted.model, ids, mask)


def test_weights_that_are_not_finite_name_the_layer_and_leave_no_hook():
    model = tiny("llama")
    find_mlp(find_blocks(model)[1][1]).exit.weight.data[0] = torch.nan
    hooks = count_hooks(model)
    with pytest.raises(NumericError, match="after layer 1"):
        analyse(model, torch.arange(12)[None])
    assert count_hooks(model) == hooks


HOSTS = {
    "llama": (transformers.LlamaConfig, {}, ("input", "gate", "up", "act", "product", "down")),
    "gpt2": (transformers.GPT2Config, {"n_embd": 32, "n_layer": 3, "n_head": 4}, ("input", "up", "act", "down")),
    "gpt_neox": (transformers.GPTNeoXConfig, {}, ("input", "up", "act", "down")),
    "qwen3": (transformers.Qwen3Config, {"head_dim": 8}, ("input", "gate", "up", "act", "product", "down")),
    "gemma2": (transformers.Gemma2Config, {"head_dim": 8}, ("input", "gate", "up", "act", "product", "down")),
    "phi3": (transformers.Phi3Config, {"pad_token_id": 0}, ("input", "gate", "up", "act", "product", "down")),
    "opt": (transformers.OPTConfig, {"ffn_dim": 64, "word_embed_proj_dim": 32}, ("input", "up", "act", "down")),
    "bloom": (transformers.BloomConfig, {"n_layer": 3, "n_head": 4}, ("input", "up", "act", "down")),
    "mixtral": (transformers.MixtralConfig, {"num_local_experts": 4}, ("input", "down")),
}


def tiny(name: str, **more: Any) -> nn.Module:
    """A random host of width 32 with three layers."""
    kind, fields, _ = HOSTS[name]
    sizes = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
    }
    torch.manual_seed(0)
    config = kind(**{**sizes, **fields, **more})
    return transformers.AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize("name", list(HOSTS))
def test_every_family_shows_its_stages(name: str):
    model = tiny(name)
    ids = torch.randint(2, 60, (1, 24), generator=torch.Generator().manual_seed(0))
    assert [block.mlp.stages for block in find_structure(model)] == [HOSTS[name][2]] * 3
    result = analyse(
        model, ids, min_jump=0, span=(0, 3), threshold=1e-6, labels=("bos_sink", "secondary", "noise"), rule="scaled"
    )
    assert {tuple(o.cosines) for o in result.origins} == {HOSTS[name][2]}
    assert result.sinks.positions() == list(range(result.primary.position + 1, 24))
    assert result.norms["hidden"]["primary"] == pytest.approx(
        whole_streams(model, ids)[:, result.primary.position].norm(dim=-1).tolist(), rel=1e-4
    )


@pytest.mark.parametrize("name", list(HOSTS))
def test_an_mlp_run_alone_gives_what_it_wrote_in_the_forward(name: str):
    model = tiny(name)
    mlp = find_structure(model)[1].mlp
    given, written = [], []
    hooks = [
        mlp.entry.register_forward_pre_hook(lambda m, a: given.append(a[0].reshape(-1, 32))),
        mlp.exit.register_forward_hook(lambda m, a, out: written.append(out.reshape(-1, 32))),
    ]
    with torch.no_grad():
        model(input_ids=torch.arange(2, 14)[None])
    for hook in hooks:
        hook.remove()
    assert torch.allclose(mlp.apply(given[0]), written[0], atol=1e-5)


@pytest.mark.parametrize("name", ["gpt2", "opt", "bloom", "mixtral"])
def test_a_write_can_be_removed_in_every_family(name: str):
    model = tiny(name)
    ids = torch.arange(2, 14)[None]
    exits: list[torch.Tensor] = []
    mlp = find_structure(model)[1].mlp
    hook = mlp.exit.register_forward_hook(lambda m, a, out: exits.append(out.reshape(12, 32).detach()))
    with torch.no_grad():
        model(input_ids=ids)
        hook.remove()
        with rescale_writes(model, 1, exits[0][7], 0.0) as touched:
            hook = mlp.exit.register_forward_hook(lambda m, a, out: exits.append(out.reshape(12, 32).detach()))
            model(input_ids=ids)
            hook.remove()
    assert 7 in touched.positions
    assert exits[1][7].norm() == 0
    others = [t for t in range(12) if t not in touched.positions]
    assert torch.equal(exits[1][others], exits[0][others])


def test_a_post_norm_host_is_read_before_its_norm():
    model = tiny("opt", do_layer_norm_before=False)
    ids = torch.randint(2, 60, (1, 24), generator=torch.Generator().manual_seed(0))
    kept: list[torch.Tensor] = []
    norms = [block.final_layer_norm for _, block in find_blocks(model)]
    hooks = [n.register_forward_pre_hook(lambda m, a: kept.append(a[0].reshape(24, 32).norm(dim=-1))) for n in norms]
    with torch.no_grad():
        model(input_ids=ids)
    for hook in hooks:
        hook.remove()
    result = analyse(model, ids, min_jump=0, span=(0, 3))
    position = result.primary.position
    assert result.norms["hidden"]["primary"] == pytest.approx([float(x[position]) for x in kept], rel=1e-4)
    assert any("post-norm" in note for note in result.notes)


def test_experts_are_never_taken_for_blocks():
    class Expert(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention, self.experts = nn.Linear(8, 8), nn.ModuleList(Expert() for _ in range(9))

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(Layer() for _ in range(4))

    assert [name for name, _ in find_blocks(Model())] == [f"layers.{i}" for i in range(4)]


def test_a_model_without_blocks_or_mlps_says_what_was_searched():
    with pytest.raises(HeadwayError, match=r"searched Sequential for a ModuleList .* found no ModuleList at all"):
        analyse(nn.Sequential(nn.Linear(4, 4)), torch.arange(8)[None])
    block = nn.ModuleDict({"attention": nn.MultiheadAttention(4, 1), "norm": nn.LayerNorm(4)})
    model = nn.ModuleDict({"layers": nn.ModuleList([block, block])})
    with pytest.raises(HeadwayError, match=r"layers\.0: searched attention \(MultiheadAttention\), norm .* for an MLP"):
        analyse(model, torch.arange(8)[None])


def test_a_host_the_door_cannot_enter_still_has_streams_and_says_why_not_keys(monkeypatch: pytest.MonkeyPatch):
    from headway.errors import InterceptionError
    from headway.methods.sinks.secondary_sinks import stream

    def refuse(*_: Any) -> None:
        raise InterceptionError("hard-coded attention")

    monkeypatch.setattr(stream, "use", refuse)
    result = analyse(tiny("llama"), torch.arange(20)[None])
    assert set(result.norms) == {"hidden"}
    assert any("hard-coded attention" in note for note in result.notes)
