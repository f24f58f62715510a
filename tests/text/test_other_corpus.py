"""`evaluation.corpus`: held-out tokens of another corpus than the one that is trained on."""

from pathlib import Path

import pytest
from conftest import make_texts, write_jsonl
from tests.planning.test_plan import changed, home  # noqa: F401 (home is a fixture)

from saeflow.config import ConfigError
from saeflow.dictionaries.series import about_place
from saeflow.dictionaries.settings import settings
from saeflow.planning.expansion import compose
from saeflow.planning.graph import Plan

PAIRS = ["dictionary=pair", "site=mlp", "tokens.held_out_tokens=2048", "jacobian.n_tokens=100"]


def plan_of(home: Path, *overrides: str) -> Plan:  # noqa: F811
    return compose(home / "conf", [*PAIRS, *overrides], results=str(home / "results"), digests=home / "digests.json")


def test_held_out_tokens_alone_are_of_another_corpus(home: Path) -> None:  # noqa: F811
    other = write_jsonl(home / "other.jsonl", make_texts(120, words=(300, 400)))
    plain = plan_of(home, "evaluation.corpus=[null,embedded]")  # which is the one that is trained on
    both = plan_of(home, f"evaluation.corpus=[null,{{name:other,path:'{other}'}}]")
    assert {stage: len(table) for stage, table in plain.stages.items() if table} == {
        "tokens": 2, "activations": 2, "train": 2, "jacobian": 1, "baseline": 2, "evaluate": 2, "figures": 1,
    }  # fmt: skip
    assert changed(plain, both) == {"tokens": 1, "jacobian": 1, "baseline": 2, "evaluate": 2, "figures": 1}
    (tokens,) = both.stages["tokens"].keys() - plain.stages["tokens"].keys()
    made = both.stages["tokens"][tokens]
    assert (made.config["split"], made.sources["corpus"], made.sources["corpus_name"]) == (
        "held_out", str(other), "other",
    )  # fmt: skip
    assert "corpus" not in next(iter(both.stages["evaluate"].values())).config["evaluation"]
    for stage in ("jacobian", "baseline", "evaluate"):
        for key in both.stages[stage].keys() - plain.stages[stage].keys():
            assert "-on_text." in key and both.stages[stage][key].needs["tokens"] == [tokens]
            held = settings(both, stage, key)
            assert held["corpus.name"] == "other" and held["training.corpus"] == "embedded"
            assert about_place(held, "m")["corpus"] == "on other"
        for key in plain.stages[stage]:
            held = settings(both, stage, key)
            assert "-on_" not in key and held["corpus.name"] == "embedded" and "training.corpus" not in held


def test_of_the_other_corpus_no_training_tokens_are_asked(home: Path) -> None:  # noqa: F811
    few = write_jsonl(home / "few.jsonl", make_texts(3, seed=1, words=(3000, 3000)))
    chosen = f"evaluation.corpus={{name:few,path:'{few}'}}"
    plan_of(home, chosen, "tokens.held_out_fraction=0.9")
    with pytest.raises(ConfigError, match=r"the held_out split holds .* but 8 rows are asked for|none is held out"):
        plan_of(home, chosen, "tokens.held_out_fraction=0.01")


def test_what_is_no_other_corpus_is_refused(home: Path) -> None:  # noqa: F811
    with pytest.raises(ConfigError, match=r"no config corpus=c5; corpus can be: c4, "):
        plan_of(home, "evaluation.corpus=c5")
    with pytest.raises(ConfigError, match=r"unknown key evaluation.corpus.pathh \(did you mean 'path'\?\)"):
        plan_of(home, "evaluation.corpus={name:x,pathh:y}")
    with pytest.raises(ConfigError, match=r"corpus\.path has to be given"):
        plan_of(home, "evaluation.corpus=local")
    with pytest.raises(ConfigError, match=r"a case has no text: set evaluation\.corpus=null"):
        compose(home / "conf", ["model=tracr", "corpus=tracr", "evaluation.corpus=embedded"], str(home / "results"))
