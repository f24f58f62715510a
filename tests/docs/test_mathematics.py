"""The page of mathematics has every loss and every metric that the code has."""

import re
import typing
from collections import defaultdict
from pathlib import Path

import numpy as np

from saeflow.config import TrainingConfig
from saeflow.dictionaries.kinds.saelens import SAELENS
from saeflow.dictionaries.kinds.trained import TrainedConfig
from saeflow.evaluation.metrics import firing, ratios
from saeflow.kernels.penalties import PENALTIES

PAGE = (Path(__file__).resolve().parents[2] / "docs/mathematics.md").read_text()
NAMED = set(re.findall(r"`([\w.=/]+)`", PAGE))


def choices(cls: type, name: str) -> set[str]:
    return set(typing.get_args(typing.get_type_hints(cls)[name]))


def test_every_metric_of_an_evaluation_has_its_formula() -> None:
    metrics = {*ratios(defaultdict(lambda: np.ones(1))), *firing(np.ones(3), 1)}
    assert {"l0", "ce_replaced", "loss_recovered_mean", "dead_fraction"} <= metrics
    assert metrics - NAMED == set()


def test_every_loss_has_its_formula() -> None:
    assert choices(TrainedConfig, "squared_error") - NAMED == set()
    assert choices(TrainedConfig, "activation") - NAMED == set()
    assert choices(TrainedConfig, "normalize_activations") - NAMED == set()
    assert {f"sparsity={one}" for one in choices(TrainedConfig, "sparsity")} - NAMED == set()
    assert choices(TrainingConfig, "revive") - {"none"} - NAMED == set()
    assert PENALTIES.keys() - NAMED == set()
    assert SAELENS.keys() - NAMED == set()


def test_every_measure_of_a_jacobian_has_its_formula() -> None:
    from saeflow.jacobians.statistics import _MEANS

    assert _MEANS.keys() - NAMED == set()


def test_every_formula_is_closed() -> None:
    """As many braces are opened as closed."""
    prose = re.sub(r"```.*?```|`[^`\n]*`", "", PAGE, flags=re.DOTALL)
    formulas = re.findall(r"\$\$(.+?)\$\$|\$([^$]+?)\$", prose, re.DOTALL)
    assert len(formulas) > 80
    for display, inline in formulas:
        text = (display or inline).replace(r"\{", "").replace(r"\}", "")
        assert text.count("{") == text.count("}"), text
