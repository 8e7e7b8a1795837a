"""Stored numbers of every mixer, for weights and inputs that are formulas: a default or an operation that drifts shows.

Where an output is meant to change, print `outputs(slug)` and say in the commit why it did."""

from __future__ import annotations

import pytest
import torch

from headway.models.mixers import mixers

GOLDEN: dict[str, list[float]] = {
    "diffqkv": [-0.019729763, -0.054260034, -0.002300338, 0.053326074],
    "inline": [-1.431655765, -0.92969696, 1.498341592, 1.922154672],
    "lightning": [-0.598808159, 0.584534908, 0.836135018, -0.245055957],
    "linear": [0.418790574, 1.099759232, 0.471874209, -0.524057262],
    "local_linear": [-0.573747377, -0.497238452, 0.371863729, 0.648218743],
    "softmax": [-0.040175344, 0.050999895, 0.060881797, -0.026281293],
    "titans_lmm": [0.315789971, 0.141125887, -0.258491488, -0.246075946],
    "titans_mac": [-0.029980488, -0.338287635, -0.107367583, 0.294695352],
    "titans_mag": [0.110533123, 0.397372551, 0.050803998, -0.376745633],
    "titans_mal": [0.115907297, -0.050234421, -0.136302961, -0.005105907],
}


def outputs(slug: str) -> list[float]:
    """Four numbers behind twenty tokens."""
    mixer = mixers()[slug].example().double().eval()
    with torch.no_grad():
        for number, parameter in enumerate(mixer.parameters()):
            order = torch.arange(parameter.numel(), dtype=torch.float64)
            parameter.copy_(0.4 * torch.sin(0.7 * order + number).view_as(parameter))
        x = torch.cos(0.9 * torch.arange(20 * mixer.width, dtype=torch.float64)).view(1, 20, mixer.width)
        return [round(value, 9) for value in mixer(x)[0][0, -1, :4].tolist()]


@pytest.mark.parametrize("slug", sorted(mixers()))
def test_outputs_are_those_that_were_stored(slug):
    assert outputs(slug) == pytest.approx(GOLDEN[slug], rel=1e-5, abs=1e-7)
