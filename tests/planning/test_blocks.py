"""Overrides of one block of a sweep change this block, and say so where it is not there."""

from typing import Any

import pytest

from saeflow.config import ConfigError
from saeflow.planning.blocks import Edit, blocks_of

GROUPS = ("dictionary", "site")
DEMO = [
    {"dictionary": "topk", "dictionary.k": [8, 16]},
    {"dictionary": "relu", "dictionary.l1_coefficient": [0.6, 1.0]},
    {"dictionary": "transcoder", "site": "mlp", "dictionary.l1_coefficient": [0.3, 0.6]},
]


def edited(*edits: tuple[str, str, Any], sweep: Any = DEMO) -> dict[str, dict]:
    blocks = blocks_of(
        sweep, GROUPS, [Edit(f"{action}sweep.{path}", path, value, action) for action, path, value in edits]
    )
    return {block.name: block.axes for block in blocks}


def test_one_value_more_of_one_block() -> None:
    found, before = edited(("+", "relu.dictionary.l1_coefficient", 4)), edited()
    assert found.pop("relu")["dictionary.l1_coefficient"] == [0.6, 1.0, 4]
    del before["relu"]
    assert found == before


def test_values_that_are_there_are_not_added_again() -> None:
    found = edited(("+", "relu.dictionary.l1_coefficient", [1.0, 2]), ("+", "relu.dictionary.l1_coefficient", 2))
    assert found["relu"]["dictionary.l1_coefficient"] == [0.6, 1.0, 2]


def test_an_axis_is_replaced_made_and_taken_away() -> None:
    found = edited(("", "topk.dictionary.k", 4), ("", "topk.seed", [0, 1]), ("~", "transcoder.site", None))
    assert found["topk"] == {"dictionary": ["topk"], "dictionary.k": [4], "seed": [0, 1]}
    assert found["transcoder"] == {"dictionary": ["transcoder"], "dictionary.l1_coefficient": [0.3, 0.6]}


def test_blocks_are_added_replaced_and_left_out() -> None:
    new = {"dictionary": "topk", "site": "resid_post"}
    found = edited(("+", "mine", new), ("~", "topk", None), ("", "relu", {"seed": 1}))
    assert found["mine"] == {"dictionary": ["topk"], "site": ["resid_post"]}
    assert found["relu"] == {"seed": [1]} and list(found) == ["relu", "transcoder", "mine"]
    assert edited(("+", "mine", new), sweep={}) == {"mine": {"dictionary": ["topk"], "site": ["resid_post"]}}


def test_blocks_that_share_a_dictionary_go_by_number() -> None:
    sweep = [{"dictionary": "relu", "seed": 0}, {"dictionary": "relu", "seed": 1}, {"dictionary": "saelens/gated"}]
    assert list(edited(sweep=sweep)) == ["0", "1", "gated"]
    assert edited(("", "1.seed", 5), sweep=sweep)["1"]["seed"] == [5]
    assert edited(("", "2.seed", 5), sweep=sweep)["gated"]["seed"] == [5]


def test_the_only_block_needs_no_name() -> None:
    sweep = {"dictionary": "transcoder", "site.layer": [0, 1]}
    assert edited(("+", "site.layer", 2), sweep=sweep)["transcoder"]["site.layer"] == [0, 1, 2]
    assert edited(("+", "transcoder.site.layer", 2), sweep=sweep)["transcoder"]["site.layer"] == [0, 1, 2]


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (("", "pair.seed", 1), "sweep.pair.seed: the sweep has no block pair; its blocks are topk, relu, transcoder"),
        (("~", "pair", None), "~sweep.pair: the sweep has no block pair"),
        (("+", "relu", {"seed": 1}), "has a block relu already"),
        (("+", "relu.seed", 1), r"block relu has no axis seed; give all of its values: sweep.relu.seed=\[...\]"),
        (("~", "relu.seed", None), "block relu has no axis seed; nothing to leave out"),
        (("", "relu.seed", []), "sweep of seed: the list is empty"),
        (("+", "mine", 3), "sweep.mine=3 must be a mapping"),
    ],
)
def test_what_is_not_there_is_said(edit: tuple[str, str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        edited(edit)
