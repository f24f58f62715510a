"""`training.exclude` in the plan: keys, who shares a job, and what is refused."""

from pathlib import Path

import pytest
from tests.planning.test_plan import changed, home  # noqa: F401 (home is a fixture)

from saeflow.config import ConfigError, TrainingConfig, build
from saeflow.planning.batches import resources
from saeflow.planning.expansion import compose
from saeflow.planning.graph import Plan

TOPK = ["sweep=null", "dictionary=topk"]


def plan_of(home: Path, *overrides: str) -> Plan:  # noqa: F811
    file = home / "resources" / "model" / "config.json"
    if "vocab_size" not in file.read_text():
        file.write_text(file.read_text().replace("{", '{"vocab_size": 500, ', 1))
    return compose(home / "conf", [*TOPK, *overrides], results=str(home / "results"), digests=home / "digests.json")


def trained(plan: Plan) -> list[dict]:
    return [instance.config["training"].get("exclude") for instance in plan.stages["train"].values()]


def test_what_is_at_its_default_is_in_no_key(home: Path) -> None:  # noqa: F811
    assert trained(plan_of(home)) == [None]
    given = "training.exclude={positions:[],token_ids:[],norm_above:null}"
    assert not changed(plan_of(home), plan_of(home, given))
    old = {path: path.read_text() for path in (home / "conf/training").glob("*.yaml")}
    before = plan_of(home)
    for path, text in old.items():  # a configuration written before there was the group
        path.write_text("".join(line for line in text.splitlines(True) if not line.startswith("exclude:")))
    assert "exclude" not in (home / "conf/training/default.yaml").read_text()
    assert plan_of(home).stages["train"].keys() == before.stages["train"].keys()


@pytest.mark.parametrize(
    ("override", "in_key"),
    [
        ("training.exclude.positions=[0]", {"positions": [0]}),
        ("training.exclude.positions=[5,0,5]", {"positions": [0, 5]}),
        ("training.exclude.token_ids=[499]", {"token_ids": [499]}),
        ("training.exclude.norm_above=10", {"norm_above": 10.0}),
    ],
)
def test_each_field_is_named_in_the_key_of_training_alone(home: Path, override: str, in_key: dict) -> None:  # noqa: F811
    plan = plan_of(home, override)
    assert trained(plan) == [in_key]
    assert changed(plan_of(home), plan) == {"train": 1, "evaluate": 1, "figures": 1}


def test_sets_are_swept_and_the_empty_one_is_the_default(home: Path) -> None:  # noqa: F811
    plan = plan_of(home, "training.exclude.positions=[[],[0],[0,1]]")
    assert trained(plan) == [None, {"positions": [0]}, {"positions": [0, 1]}]
    assert plan_of(home).stages["train"].keys() <= plan.stages["train"].keys()
    assert len(trained(plan_of(home, "training.exclude.norm_above=[null,5,10]"))) == 3


def test_dictionaries_share_a_job_only_where_they_train_on_the_same_tokens(home: Path) -> None:  # noqa: F811
    def sizes(*overrides: str) -> list[int]:
        plan = plan_of(home, *overrides)
        return sorted(map(len, plan.batches["train"]))

    two_k, two_hooks = "dictionary.k=[4,8]", "site=mlp_in,mlp_out"
    assert sizes(two_k, "training.exclude.positions=[[],[0]]") == [2, 2]
    assert sizes(two_hooks) == sizes(two_hooks, "training.exclude.positions=[0]") == [2]
    assert sizes(two_k, two_hooks, "training.exclude.norm_above=10") == [2, 2]


def test_finding_tokens_by_norm_asks_for_memory_by_their_number(home: Path) -> None:  # noqa: F811
    def memory(*overrides: str) -> int:
        plan = plan_of(home, "tokens.train_tokens=1_000_000_000", *overrides)
        return int(resources(plan, "train", list(plan.stages["train"]))["mem_mb"])

    plain = memory()
    assert 7_000 < memory("training.exclude.positions=[0]") - plain < 9_000
    assert 19_000 < memory("training.exclude.norm_above=10") - plain < 21_000


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("positions=[-1]", r"training\.exclude\.positions=\[-1\] is out of range: it must be a list of 0 or more"),
        ("positions=[0,128]", r"128 is out of range; with tokens\.context_size=128 they are 0 to 127"),
        ("positions=0", r"training\.exclude\.positions=0 must be a list"),
        ("positions=[a]", r"training\.exclude\.positions\[0\]='a' must be of type int"),
        (
            f"positions={list(range(128))}".replace(" ", ""),
            "names all 128 that there are: no token is left to train on",
        ),
        ("token_ids=[-2]", r"training\.exclude\.token_ids=\[-2\] is out of range"),
        ("token_ids=[3,500]", r"500 is out of range; with a vocabulary of 500 tokens they are 0 to 499"),
        (f"token_ids={list(range(500))}".replace(" ", ""), "names all 500 that there are"),
        ("norm_above=1", r"training\.exclude\.norm_above=1\.0 is out of range: it must be more than 1"),
        ("norm_above=-3", r"training\.exclude\.norm_above=-3\.0 is out of range"),
        ("tokens=[0]", r"unknown key 'training\.exclude\.tokens'"),
    ],
)
def test_what_cannot_be_left_out_is_refused(home: Path, override: str, message: str) -> None:  # noqa: F811
    with pytest.raises(ConfigError, match=message):
        plan_of(home, "tokens.context_size=128", f"training.exclude.{override}")


def test_a_model_that_does_not_say_its_vocabulary_is_named_where_it_matters(home: Path) -> None:  # noqa: F811
    plain = compose(home / "conf", [*TOPK, "training.exclude.positions=[0]"], digests=home / "digests.json")
    assert trained(plain) == [{"positions": [0]}]
    with pytest.raises(ConfigError, match="does not say its vocab_size"):
        compose(home / "conf", [*TOPK, "training.exclude.token_ids=[0]"], digests=home / "digests.json")


def test_equal_sets_are_equal_options() -> None:
    given = [{"positions": p, "token_ids": ids} for p, ids in (([3, 1], [2]), ([1, 3, 3], [2, 2]))]
    options = [build(TrainingConfig, {"n_tokens": 4096, "exclude": one}, "training.") for one in given]
    assert options[0] == options[1] and options[0].exclude.identity() == {"positions": (1, 3), "token_ids": (2,)}


def test_the_vocabulary_of_a_case_is_known_before_its_model_is_there() -> None:
    root = Path(__file__).resolve().parents[2]
    case = ["experiment=tracr_case3"]
    assert compose(root / "conf", [*case, "training.exclude.token_ids=[0]"]).stages["train"]
    with pytest.raises(ConfigError, match=r"99 is out of range; with a vocabulary of \d tokens"):
        compose(root / "conf", [*case, "training.exclude.token_ids=[99]"])
