"""The preference loss at unit weights beside TRL's trainer, on the same model, reference and pairs."""

from __future__ import annotations

import copy

import pytest
import torch

from headway.hosts.tiny import tiny_host
from headway.methods.diagnosis import diagnose_localize_align as dla
from headway.methods.diagnosis.diagnose_localize_align.preference import token_logps

BETA = 0.3


@pytest.fixture
def trainer(tmp_path):
    pytest.importorskip("trl")
    from datasets import Dataset
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    from trl import DPOConfig, DPOTrainer

    words = {"<pad>": 0, "<eos>": 1, **{f"w{i}": i + 2 for i in range(60)}}
    core = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="<eos>")
    torch.manual_seed(0)
    model = tiny_host("llama", max_position_embeddings=64)[0]
    reference = copy.deepcopy(model)
    with torch.no_grad():
        for weight in reference.parameters():
            weight.add_(0.05 * torch.randn_like(weight))
    rows = [
        {"prompt": "w1 w2 w3", "chosen": " w4 w5", "rejected": " w6 w7 w8"},
        {"prompt": "w9 w10", "chosen": " w11 w12 w13 w14", "rejected": " w15"},
    ]
    options = DPOConfig(
        output_dir=str(tmp_path), beta=BETA, report_to=[], use_cpu=True, per_device_train_batch_size=2,
        gradient_checkpointing=False, bf16=False,
    )  # fmt: skip
    return DPOTrainer(
        model=model, ref_model=reference, args=options, train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )  # fmt: skip


def test_unit_weights_are_the_loss_and_the_gradient_of_trl(trainer):
    batch = next(iter(trainer.get_train_dataloader()))
    model, reference = trainer.model.eval(), trainer.ref_model.eval()
    theirs = trainer.compute_loss(model, dict(batch))
    theirs.backward()
    wanted = {name: weight.grad.clone() for name, weight in model.named_parameters()}
    model.zero_grad()

    def ratios(side):
        ids, response = batch["input_ids"][side], batch["completion_mask"][side].bool()
        inputs = {"input_ids": ids, "attention_mask": batch["attention_mask"][side]}
        with torch.no_grad():
            fixed = token_logps(reference(**inputs).logits, ids, response)
        return token_logps(model(**inputs).logits, ids, response) - fixed, response.float()

    pairs = len(batch["input_ids"]) // 2
    chosen, chosen_weights = ratios(slice(0, pairs))
    rejected, rejected_weights = ratios(slice(pairs, None))
    assert float(chosen.detach().abs().max()) > 0.01
    ours = dla.preference_loss(chosen, rejected, chosen_weights, rejected_weights, beta=BETA).loss
    ours.backward()
    assert float(ours.detach()) == pytest.approx(float(theirs.detach()), abs=1e-6)
    for name, weight in model.named_parameters():
        assert torch.allclose(weight.grad, wanted[name], atol=1e-6), name
