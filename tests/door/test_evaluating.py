from torch import nn

import headway
from headway.door.evaluating import evaluating
from headway.models import HeadwayConfig, HeadwayForCausalLM


def test_only_what_trained_trains_again():
    model = nn.Sequential(nn.Dropout(), nn.Dropout()).train()
    model[1].eval()
    with evaluating(model):
        assert not any(m.training for m in model.modules())
    assert [m.training for m in model.modules()] == [True, True, False]


def test_attaching_leaves_a_frozen_part_of_a_training_model_frozen():
    model = HeadwayForCausalLM(HeadwayConfig(vocab_size=50, width=16, layers=2, heads=2)).train()
    model.layers[0].eval()
    with headway.capture(model, what=("entropy",)):
        pass
    assert not model.layers[0].training
    assert model.layers[1].training
