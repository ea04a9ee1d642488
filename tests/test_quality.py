import math

import numpy as np
import pytest
import torch

from timm_cgh.eval.quality import alignment, rankme, uniformity


def test_rankme_equals_a_float64_svd():
    features = torch.randn(50, 20) @ torch.randn(20, 20)
    singular = np.linalg.svd(features.numpy().astype(np.float64), compute_uv=False)
    p = singular / singular.sum() + 1e-7
    assert rankme(features) == pytest.approx(math.exp(-(p * np.log(p)).sum()), rel=1e-9)


@pytest.mark.parametrize('rank', [1, 3, 8])
def test_rankme_of_directions_of_equal_strength_is_their_number(rank):
    basis = torch.linalg.qr(torch.randn(16, rank)).Q  # (16, rank), orthonormal
    coordinates = torch.linalg.qr(torch.randn(64, rank)).Q
    assert rankme(coordinates @ basis.T) == pytest.approx(rank, rel=1e-3)


def test_rankme_of_features_that_are_all_zero_is_finite():
    assert math.isfinite(rankme(torch.zeros(8, 4)))


def test_alignment_is_the_mean_squared_distance_of_unit_vectors():
    x = torch.randn(10, 4)
    assert alignment(x, 3 * x) == pytest.approx(0, abs=1e-6) and alignment(x, -x) == pytest.approx(4)


def test_uniformity_equals_its_definition_and_prefers_spread_features():
    x = torch.nn.functional.normalize(torch.randn(12, 4), dim=1)
    pairs = [math.exp(-2 * float((x[i] - x[j]).square().sum())) for i in range(12) for j in range(i)]
    assert uniformity(5 * x) == pytest.approx(math.log(sum(pairs) / len(pairs)), rel=1e-5)
    assert uniformity(torch.ones(12, 4)) == pytest.approx(0, abs=1e-6) and uniformity(x) < -0.5
