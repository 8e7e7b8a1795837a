"""DHSA's boundary predictor: its form, its file, and that it learns."""

from __future__ import annotations

import json

import pytest
import torch
from torch.nn.functional import binary_cross_entropy_with_logits

import headway
from headway.errors import ArgumentError, HostError, NumericError
from headway.hosts.tiny import tiny_host
from headway.methods.long_context.dhsa import (
    DHSA,
    BoundaryPredictor,
    Predicted,
    Recorded,
    attention_ratio,
    focal_loss,
    record_boundaries,
    score_predictor,
    train_predictor,
)
from headway.methods.long_context.dhsa.training import BoundaryRecorder


@pytest.fixture(scope="module")
def host():
    return tiny_host("llama", num_key_value_heads=2, max_position_embeddings=256)[0]


def texts(count: int, length: int = 80):
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(8, 100, (1, length), generator=generator) for _ in range(count)]


def planted(count: int, seed: int = 0) -> list[Recorded]:
    """Keys in segments of one of six directions, labelled where segments meet."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(6, 16, generator=generator)
    found = []
    for text in range(count):
        lengths = torch.randint(10, 30, (10,), generator=generator).tolist()
        steps = torch.randint(1, 6, (10,), generator=generator).cumsum(0) % 6
        keys = torch.cat([centres[i].expand(n, -1) for i, n in zip(steps.tolist(), lengths, strict=True)])
        keys = keys + 0.2 * torch.randn(keys.shape, generator=generator)
        ratio = torch.ones(keys.shape[0])
        ratio[torch.tensor(lengths).cumsum(0)[:-1] - 1] = 5.0
        found.append(Recorded(keys, ratio, 0, text))
    return found


class TestForm:
    def test_every_token_has_a_logit(self):
        predictor = BoundaryPredictor(16, heads=4)
        assert predictor(torch.randn(2, 1, 16)).shape == (2, 1)
        assert predictor(torch.randn(2, 700, 16)).shape == (2, 700)

    def test_a_logit_depends_on_its_window_alone_and_moves_with_it(self):
        predictor = BoundaryPredictor(16, heads=4).eval()
        keys = torch.randn(1, 60, 16)
        moved = torch.cat([torch.randn(1, 5, 16), keys[:, :-5]], 1)
        with torch.no_grad():
            here, there = predictor(keys), predictor(moved)
        torch.testing.assert_close(there[:, 8:51], here[:, 3:46], atol=1e-5, rtol=1e-5)
        changed = keys.clone()
        changed[:, 30] += 1
        with torch.no_grad():
            touched = (predictor(changed) - here).abs()[0] > 1e-6
        assert touched.nonzero()[:, 0].tolist() == list(range(26, 34))

    @pytest.mark.parametrize("pool", ["mean", "gated"])
    def test_projecting_a_token_once_is_attention_in_every_window(self, pool):
        """Logits and gradients against the module run on each window of keys for itself."""
        predictor, keys = BoundaryPredictor(16, heads=4, pool=pool), torch.randn(1, 21, 16, requires_grad=True)
        torch.nn.init.normal_(predictor.mixer.in_proj_bias)
        logits = predictor(keys)
        padded = torch.nn.functional.pad(keys, (0, 0, 3, 4))[0]
        for gap in range(21):
            window = padded[None, gap : gap + 8]
            mixed = predictor.norm(predictor.mixer(window, window, window, need_weights=False)[0])
            left, right = (predictor._pooled(half)[0] for half in mixed.split(4, 1))
            alike = torch.cosine_similarity(left, right, dim=0)[None]
            features = torch.cat([left, right, (left - right).abs(), left * right, alike])
            torch.testing.assert_close(logits[0, gap], predictor.head(features)[0], atol=1e-5, rtol=1e-4)
        logits.sum().backward()
        assert all(float(p.grad.abs().sum()) > 0 for p in predictor.mixer.parameters())

    def test_gaps_at_a_time_change_nothing(self, monkeypatch):
        predictor, keys = BoundaryPredictor(16, heads=4).eval(), torch.randn(1, 60, 16)
        with torch.no_grad():
            whole = predictor(keys)
            monkeypatch.setattr("headway.methods.long_context.dhsa.predictor.GAPS", 7)
            torch.testing.assert_close(predictor(keys), whole, atol=1e-6, rtol=1e-5)

    @pytest.mark.parametrize("encoder", ["attention", "conv", "stack"])
    @pytest.mark.parametrize("pool", ["mean", "gated"])
    def test_every_form_reads_its_window_and_is_saved_with_its_form(self, encoder, pool, tmp_path):
        predictor = BoundaryPredictor(16, heads=4, encoder=encoder, pool=pool).eval()
        keys = torch.randn(1, 30, 16)
        changed = keys.clone()
        changed[:, 15] += torch.randn(16)
        with torch.no_grad():
            touched = (predictor(changed) - predictor(keys)).abs()[0] > 1e-6
            again = BoundaryPredictor.load(predictor.save(tmp_path))
            assert torch.equal(again(keys), predictor(keys))
        assert touched.nonzero()[:, 0].tolist() == list(range(11, 19))

    @pytest.mark.parametrize(("name", "value"), [("encoder", "lstm"), ("pool", "max")])
    def test_an_unknown_form_is_named(self, name, value):
        with pytest.raises(ArgumentError, match=f"{name}: got '{value}'"):
            BoundaryPredictor(16, **{name: value})

    def test_keys_of_another_width_are_refused(self):
        with pytest.raises(ArgumentError, match=r"keys: got shape \(1, 5, 8\), expected \(batch, tokens, 16\)"):
            BoundaryPredictor(16)(torch.zeros(1, 5, 8))

    def test_a_width_that_heads_do_not_divide_is_refused(self):
        with pytest.raises(ArgumentError, match="got 12, 4, 8, 256"):
            BoundaryPredictor(12)


class TestFile:
    def saved(self, host, folder):
        from headway.hosts.fingerprint import fingerprint

        width = 2 * host.config.head_dim
        predictor = BoundaryPredictor(width, heads=2, hidden=8, made_on=fingerprint(host), source={"texts": 3}).eval()
        predictor.save(folder)
        return predictor

    def test_a_saved_predictor_says_the_same(self, host, tmp_path):
        predictor = self.saved(host, tmp_path)
        again = BoundaryPredictor.load(tmp_path, model=host)
        keys = torch.randn(1, 20, predictor.width)
        with torch.no_grad():
            assert torch.equal(again(keys), predictor(keys))
        assert again.source == {"texts": 3}
        assert not again.training

    def test_another_model_is_refused(self, host, tmp_path):
        self.saved(host, tmp_path)
        other = tiny_host("llama", num_key_value_heads=2, seed=1)[0]
        with pytest.raises(HostError, match="predictor: got one that was made on another model"):
            BoundaryPredictor.load(tmp_path, model=other)

    def test_missing_broken_and_foreign_files_are_named(self, host, tmp_path):
        with pytest.raises(ArgumentError, match=r"without predictor\.json"):
            BoundaryPredictor.load(tmp_path)
        self.saved(host, tmp_path)
        (tmp_path / "predictor.safetensors").write_bytes(b"no tensors")
        with pytest.raises(ArgumentError, match="missing or broken"):
            BoundaryPredictor.load(tmp_path)
        (tmp_path / "predictor.safetensors").unlink()
        with pytest.raises(ArgumentError, match=r"without predictor\.safetensors"):
            BoundaryPredictor.load(tmp_path)
        (tmp_path / "predictor.json").write_text(json.dumps({"format": "other"}))
        with pytest.raises(ArgumentError, match="without format"):
            BoundaryPredictor.load(tmp_path)


class TestTraining:
    def test_without_focus_and_weight_the_loss_is_cross_entropy(self):
        logits, targets = torch.randn(50), torch.rand(50) < 0.3
        plain = binary_cross_entropy_with_logits(logits, targets.float(), reduction="none")
        torch.testing.assert_close(focal_loss(logits, targets, focus=0, positive=1), plain)

    def test_focus_turns_to_what_is_wrong(self):
        loss = focal_loss(torch.tensor([3.0, -3.0]), torch.tensor([True, True]))
        plain = focal_loss(torch.tensor([3.0, -3.0]), torch.tensor([True, True]), focus=0)
        assert float(loss[0] / plain[0]) == pytest.approx(float(torch.sigmoid(torch.tensor(-3.0))) ** 2)
        assert float(loss[1] / plain[1]) == pytest.approx(float(torch.sigmoid(torch.tensor(3.0))) ** 2)

    def test_by_default_a_boundary_weighs_as_in_the_released_code(self):
        """1.3 times, and an easy gap counts by the square of what is wrong: by hand at logits ±1."""
        wrong = 1 / (1 + torch.tensor(1.0).exp())
        easy = wrong**2 * -(1 - wrong).log()
        loss = focal_loss(torch.tensor([1.0, -1.0]), torch.tensor([True, False]))
        torch.testing.assert_close(loss, torch.stack([1.3 * easy, easy]))

    def test_planted_segments_are_learnt(self, host):
        """Where keys change direction there is a boundary: found on texts that were held out."""
        trained = train_predictor(host, planted(24), epochs=20, rate=2e-3, heads=4)
        assert trained.scores.f1 > 0.9
        assert trained.scores.f1 > 5 * trained.scores.rate
        assert trained.losses[-1] < 0.3 * trained.losses[0]
        assert len(trained.held_out) == 5

    def test_training_repeats_and_leaves_the_random_state(self, host):
        torch.manual_seed(7)
        state = torch.get_rng_state()
        one, two = (train_predictor(host, planted(3), epochs=2, heads=4, seed=3) for _ in range(2))
        assert torch.equal(torch.get_rng_state(), state)
        assert one.losses == two.losses
        for a, b in zip(one.predictor.parameters(), two.predictor.parameters(), strict=True):
            assert torch.equal(a, b)

    def test_recorded_keys_and_labels_are_the_hosts(self, host):
        ids = texts(1)[0]
        recorded = record_boundaries(host, [ids])
        assert [sample.layer for sample in recorded] == [0, 1]
        recorder = BoundaryRecorder()
        calls = []
        with headway.observe(host, recorder), torch.no_grad():
            plain = recorder.observe
            recorder.observe = lambda call, *rest: calls.append(call) or plain(call, *rest)
            host(input_ids=ids)
        for sample, call in zip(recorded, calls, strict=True):
            assert torch.equal(sample.keys, call.key[0].transpose(0, 1).flatten(1))
            torch.testing.assert_close(sample.ratio, attention_ratio(call, mode="reference")[0], atol=1e-3, rtol=1e-3)

    def test_a_trained_predictor_cuts_prompts_of_its_model(self, host):
        recorded = record_boundaries(host, texts(3), layers=[0])
        trained = train_predictor(host, recorded, epochs=1, heads=2)
        trained.predictor.check(host)
        stage = DHSA(
            boundaries=Predicted(predictor=trained.predictor, threshold=-9),
            budget=40,
            block=16,
            local_tokens=16,
            global_tokens=4,
            suffix=0,
            approximates=False,
        )
        with headway.use(host, stage) as handle, torch.no_grad():
            host(input_ids=texts(1, 120)[0])
        assert all(row["paths"] == {"keys": 1} for row in handle.report())

    def test_scores_count_gaps(self):
        class Says(BoundaryPredictor):
            def forward(self, keys):
                return keys[..., 0]

        ratio = torch.ones(40)
        ratio[[10, 20, 30]] = 3.0
        keys = torch.full((40, 8), -1.0)
        keys[[10, 20, 25], 0] = 1.0
        scores = score_predictor(Says(8), [Recorded(keys, ratio, 0, 0)])
        assert (scores.precision, scores.recall) == (pytest.approx(2 / 3), pytest.approx(2 / 3))
        assert scores.f1 == pytest.approx(2 / 3)
        assert scores.rate == pytest.approx(3 / 25)

    @pytest.mark.parametrize(("best", "overlap"), [(3, 2 / 3), (2, 1.0)])
    def test_overlap_is_that_of_the_best_gaps_of_both(self, best, overlap):
        class Says(BoundaryPredictor):
            def forward(self, keys):
                return keys[..., 0]

        ratio, keys = torch.ones(60), torch.zeros(60, 8)
        ratio[[10, 20, 30]] = torch.tensor([9.0, 8.0, 7.0])
        keys[[20, 10, 40], 0] = torch.tensor([3.0, 2.0, 1.0])
        # Nothing within 2w of an end counts.
        keys[[0, 59], 0] = 9.0
        assert score_predictor(Says(8), [Recorded(keys, ratio, 0, 0)], best=best).overlap == pytest.approx(overlap)

    def test_a_step_is_taken_for_each_text_over_all_its_layers(self, host, monkeypatch):
        """Two epochs of two kept texts of three layers: twelve losses, four steps at the released rate."""
        steps, rates = [], []
        plain = torch.optim.Adam.step

        def step(optimizer, *args):
            steps.append(1)
            rates.append(optimizer.param_groups[0]["lr"])
            return plain(optimizer, *args)

        monkeypatch.setattr(torch.optim.Adam, "step", step)
        samples = [Recorded(s.keys, s.ratio, layer, s.text) for s in planted(3) for layer in range(3)]
        trained = train_predictor(host, samples, heads=4)
        assert len(trained.held_out) == 1
        assert (len(steps), set(rates)) == (4, {1e-4})

    def test_one_text_or_no_epoch_is_refused(self, host):
        with pytest.raises(ArgumentError, match="got 1 texts"):
            train_predictor(host, planted(1))
        with pytest.raises(ArgumentError, match="0 epochs"):
            train_predictor(host, planted(3), epochs=0)

    def test_labels_of_another_window_are_refused(self, host):
        """A predictor that reads other tokens than its labels are about would learn something else without a word."""
        recorded = record_boundaries(host, texts(2), layers=[0], window=2)
        with pytest.raises(ArgumentError, match=r"window: got 4 for labels of \[2\] tokens"):
            train_predictor(host, recorded, heads=2)
        assert train_predictor(host, recorded, heads=2, window=2, epochs=1).predictor.window == 2

    def test_a_text_without_valid_gaps_is_refused(self, host):
        short = [Recorded(torch.randn(12, 16), torch.ones(12), 0, i) for i in range(3)]
        with pytest.raises(ArgumentError, match="expected more than 16"):
            train_predictor(host, short, heads=4)

    def test_a_loss_that_is_no_number_is_refused(self, host):
        broken = [Recorded(torch.full((40, 16), torch.nan), torch.ones(40), 0, i) for i in range(3)]
        with pytest.raises(NumericError, match="loss: got nan"):
            train_predictor(host, broken, heads=4, epochs=1)

    def test_a_batch_of_texts_is_refused(self, host):
        """One by one: pads would be keys, and only the first row would be recorded."""
        with pytest.raises(ArgumentError, match=r"texts: got shape \(2, 80\), expected \(1, tokens\)"):
            record_boundaries(host, [texts(1)[0].repeat(2, 1)])

    def test_no_texts_are_refused(self, host):
        with pytest.raises(ArgumentError, match="texts: got none"):
            record_boundaries(host, [])
