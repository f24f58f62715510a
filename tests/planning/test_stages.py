"""Stages and kinds as their packages declare them."""

import dataclasses
import inspect
import subprocess
import sys

import pytest

from saeflow.config import PointConfig
from saeflow.config.dictionary import DictionaryConfig, kinds
from saeflow.dictionaries.naming import SERIES
from saeflow.planning.stages import Stage, in_order, stages
from saeflow.training.protocol import DictionaryTrainer


def stage(name: str, *needs: str, **more) -> Stage:
    return Stage(name, (name, name), lambda jobs: "", lambda expansion: None, needs=needs, **more)


def test_a_stage_comes_after_all_that_it_needs() -> None:
    names = list(stages())
    for found in stages().values():
        for needed in (*found.needs, *found.after):
            assert names.index(needed) < names.index(found.name)
    assert names[-1] == "figures"


def test_stages_that_need_each_other_are_refused() -> None:
    assert list(in_order([stage("c", "b"), stage("b", "a"), stage("a")])) == ["a", "b", "c"]
    assert list(in_order([stage("b", says_all=True), stage("c"), stage("a")])) == ["a", "c", "b"]
    with pytest.raises(ValueError, match="stages need each other in a circle: a, b"):
        in_order([stage("a", "b"), stage("b", "a"), stage("c")])


def test_what_stages_read_is_in_the_configuration() -> None:
    groups = {field.name for field in dataclasses.fields(PointConfig)} | {"tokenizer"}  # which sources add
    for found in stages().values():
        assert {path.split(".")[0] for path in found.reads} <= groups


def test_the_order_of_kinds_is_not_that_of_imports() -> None:
    """Colours in figures follow it."""
    code = "from saeflow.dictionaries.kinds import transcoder\nfrom saeflow.dictionaries import naming\n"
    code += "print(naming.SERIES)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(SERIES) and SERIES[:2] == ("TopK SAE", "ReLU + L1 SAE")
    assert list(kinds()) == sorted(kinds())


@pytest.mark.parametrize("name", kinds())
def test_a_kind_answers_and_its_trainer_does_what_training_asks(name: str) -> None:
    kind = kinds()[name]
    assert issubclass(kind, DictionaryConfig) and kind.studies <= stages().keys()
    if kind.trainer:
        found = kind.trainer_class(kind)  # asks nothing of an instance
        asked = {n for n, _ in inspect.getmembers(DictionaryTrainer) if not n.startswith("_")}
        missing = {n for n in asked - {"step", "n_steps"} if not hasattr(found, n)}
        assert not missing
