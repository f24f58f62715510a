"""Names of dictionaries in figures: one a kind, in the order of their colours."""

import pytest

from saeflow.dictionaries.naming import SERIES, amount_name, hook_title, place_name, series_name


@pytest.mark.parametrize(
    ("spec", "name"),
    [
        (("sae", "topk"), "TopK SAE"),
        (("sae", "batchtopk"), "BatchTopK SAE"),
        (("sae", "jumprelu"), "BatchTopK SAE"),
        (("sae", "jumprelu", False, None, "gemma"), "gemma (JumpReLU SAE)"),
        (("transcoder", "relu", True), "skip ReLU + L1 transcoder"),
        (("sae", "saelens", False, "matching_pursuit"), "SAELens matching pursuit"),
        (("sae", "topk", False, float("nan"), "", 3), "TopK SAE of one head"),
        (("heads", "relu"), "ReLU + L1 SAEs by head"),
        (("sae", "saelens"), "SAELens SAE"),
    ],
)
def test_kinds_are_named(spec: tuple, name: str) -> None:
    assert series_name(*spec) == name


def test_order_has_every_kind_once() -> None:
    assert len(set(SERIES)) == len(SERIES) == 18 and SERIES[0] == "TopK SAE" and SERIES[9] == "skip TopK SAE"


def test_places_and_amounts_are_named() -> None:
    assert hook_title("blocks.2.ln2.hook_normalized") == "layer 2, ln2.normalized" and hook_title("embed") == "embed"
    assert place_name("blocks.1.attn.hook_z", 2) == "layer 1, attn.z, head 2"
    names = [amount_name(name) for name in ("k", "l1_coefficient", "l0_coefficient", "some_other")]
    assert names == ["k", "L1", "L0 coefficient", "some other"]
