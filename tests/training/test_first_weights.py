"""`training.initial=kaiming`, notebook 002's first weights, against PyTorch's own draw and SciPy's median."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.optimize import minimize

from saeflow.config import ConfigError
from saeflow.dictionaries.initial import geometric_median, initial_weights
from saeflow.dictionaries.spec import Spec
from saeflow.planning.expansion import compose

ROOT = Path(__file__).resolve().parents[2]


def scipy_median(points: torch.Tensor) -> torch.Tensor:
    x = points.double().numpy()
    found = minimize(lambda m: np.linalg.norm(x - m, axis=1).sum(), x.mean(0), method="BFGS", tol=1e-10)
    return torch.from_numpy(found.x)


@pytest.mark.parametrize("d", [1, 3, 20])
def test_geometric_median_is_the_minimum(d: int) -> None:
    generator = torch.Generator().manual_seed(d)
    points = torch.randn(101, d, generator=generator)
    points[:10] += 100  # which the mean follows
    median = geometric_median(points)
    torch.testing.assert_close(median, scipy_median(points), atol=2e-4, rtol=0)
    assert (points.mean(dim=0) - median).norm() > 5


def test_geometric_median_of_points_that_coincide() -> None:
    points = torch.ones(7, 4)
    torch.testing.assert_close(geometric_median(points), torch.ones(4, dtype=torch.float64))
    points[0] = 50  # the majority is the median, at which the distance is 0
    torch.testing.assert_close(geometric_median(points), torch.ones(4, dtype=torch.float64), atol=1e-6, rtol=0)


@pytest.mark.parametrize("kind", ["sae", "transcoder"])
@pytest.mark.parametrize("sparsity", ["unit_norm", "decoder_norm"])
def test_encoder_and_decoder_are_drawn_apart_by_kaiming(kind: str, sparsity: str) -> None:
    d, n = 32, 4096
    spec = Spec(kind, "relu", d, d, n, "h", "h" if kind == "sae" else "g", l1_coefficient=1.0, sparsity=sparsity)
    weights = initial_weights(spec, torch.ones(d), 0, "kaiming")
    theirs = torch.nn.init.kaiming_uniform_(torch.empty(n, d)), torch.nn.init.kaiming_uniform_(torch.empty(d, n)).T
    decoder = theirs[0] / theirs[0].norm(dim=1, keepdim=True) if sparsity == "unit_norm" else theirs[0]
    for ours, its in ((weights.W_dec, decoder), (weights.encoder, theirs[1])):
        assert ours.std().item() == pytest.approx(its.std().item(), rel=0.02)
        assert ours.abs().max().item() == pytest.approx(its.abs().max().item(), rel=0.1)
    aligned = torch.nn.functional.cosine_similarity(weights.W_dec, weights.encoder, dim=1)
    assert aligned.abs().mean() < 2 / math.sqrt(d)
    assert not weights.b_enc.any()


def test_saelens_classes_refuse_what_they_would_not_hear() -> None:
    given = ["dictionary=saelens/gated", "training.initial=kaiming"]
    with pytest.raises(ConfigError, match=r"training\.initial=.*saeflow or saelens with activation=saelens"):
        compose(ROOT / "conf", given)
