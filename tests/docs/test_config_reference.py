"""The reference of the configuration leaves nothing out: every setting has a meaning, a unit and a reader."""

import dataclasses

import pytest
import yaml
from config_reference import CONF, UNITS, describe, documented, read_by, readers, strings

from saeflow.config import PointConfig
from saeflow.config.device import SETTINGS as DEVICE
from saeflow.config.dictionary import kinds
from saeflow.planning.stages import stages
from saeflow.planning.sweep import SETTINGS as EXPERIMENT

EVERY = list(documented())


def of(path: str) -> list:
    return [one for one in EVERY if one.path == path]


@pytest.mark.parametrize("one", EVERY, ids=lambda one: one.path)
def test_every_setting_is_described(one) -> None:
    assert one.meaning.endswith(".") and one.meaning[0].isupper(), f"{one.path}: {one.meaning!r}"
    assert read_by(one.path), f"{one.path}: nothing is known to read it"


@pytest.mark.parametrize("one", EVERY, ids=lambda one: one.path)
def test_numbers_have_units_and_nothing_else_has(one) -> None:
    number = any(word in one.type for word in ("number", "numbers"))
    assert (one.unit in UNITS) if number else (one.unit == "")


def test_all_groups_and_all_kinds_are_there() -> None:
    assert {one.path.split(".")[0] for one in EVERY} == {f.name for f in dataclasses.fields(PointConfig)} | {"blind"}
    assert {kind for one in EVERY for kind in one.kinds} == set(kinds())
    (k,) = of("dictionary.k")
    assert (
        set(k.kinds) == set(kinds()) - {"foreign", "foreign_pair"}
        and k.type == "whole number or null"
        and k.unit == "latents"
    )


def test_parts_of_a_string() -> None:
    assert describe("[tokens] How many. At most. Source: a paper.") == ("tokens", "How many. At most.", "a paper")
    assert describe("Whether it is so.") == ("", "Whether it is so.", "")

    @dataclasses.dataclass(frozen=True)
    class Bare:
        described: int
        """Yes."""
        bare: int

    assert strings.__wrapped__(Bare) == {"described": "Yes."}


def test_readers_are_those_of_the_plan() -> None:
    assert readers()["training.lr"] == ("train",)
    assert readers()["evaluation.replace_first"] == ("baseline", "evaluate")
    assert readers()["tokens.train_tokens"] == ("tokens", "activations")
    assert readers()["model.tracr.method"] == ("groundtruth",)
    assert read_by("training.together") == "`train`, as to how it runs: in no key"
    assert not read_by("training.no_such_setting")


def test_the_default_presets_are_told_where_they_differ() -> None:
    (lr,), (betas,) = of("training.lr"), of("training.adam_beta1")
    assert (lr.default, lr.usual) == ("0.0004", "0.006") and betas.usual == ""
    (tokens,) = of("tokens.train_tokens")
    assert (tokens.default, tokens.usual) == ("has to be given", "307200")


def test_every_key_of_conf_is_in_the_reference() -> None:
    groups = {one.path.rsplit(".", 1)[0] for one in EVERY} | {one.path for one in EVERY}
    for file in CONF.rglob("*.yaml"):
        group = file.relative_to(CONF).parts[0]
        if group in ("device", "experiment", "config.yaml"):
            continue
        for key in yaml.safe_load(file.read_text()):
            assert key == "defaults" or f"{group}.{key}" in groups, f"{file} sets {key}"
    root = yaml.safe_load((CONF / "config.yaml").read_text()).keys() - {"defaults"}
    assert root <= {*EXPERIMENT, *(f.name for f in dataclasses.fields(PointConfig))}
    for file in CONF.glob("device/*.yaml"):
        assert yaml.safe_load(file.read_text()).keys() - stages().keys() - DEVICE.keys() == set()
    assert all(describe(text).meaning.endswith(".") for text in (*DEVICE.values(), *EXPERIMENT.values()))
