"""What keys are made of, and what folders are called: contents and settings, never names, defaults or the sweep."""

import dataclasses
import json
import re
import shutil
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from saeflow.config import ConfigError, PointConfig, TrainingConfig
from saeflow.config.defaults import defaults, groups, set_apart, with_defaults
from saeflow.config.dictionary import DictionaryConfig, kinds
from saeflow.config.labels import LONGEST, check_names, file_safe, joined, merged, unusual
from saeflow.planning.expansion import compose
from saeflow.planning.graph import Plan
from saeflow.planning.overrides import quoted

ROOT = Path(__file__).resolve().parents[2]
PINNED = Path(__file__).with_name("defaults.txt").read_text().splitlines()


def plan_of(home: Path, *overrides: str) -> Plan:
    return compose(home / "conf", ["sweep=null", *overrides], results=str(home / "results"))


def names(plan: Plan, stage: str) -> list[str]:
    return [key.rsplit("-", 1)[0] for key in plan.stages[stage]]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("names")
    shutil.copytree(ROOT / "conf", home / "conf")
    shutil.copytree(ROOT / "resources", home / "resources", ignore=shutil.ignore_patterns("cases", "*.md"))
    return home


def keys(plan: Plan) -> dict[str, list[str]]:
    return {stage: sorted(table) for stage, table in plan.stages.items()}


# -------------------------------------------------------------------- defaults
def test_defaults_are_what_keys_take_them_for() -> None:
    """A line of the file that does not hold makes stored results wrong: then raise the versions of the stages that read
    the setting. New settings are added to the file."""
    found = []
    for name, cls in groups().items():
        for kind, one in kinds().items() if cls is DictionaryConfig else [("", cls)]:
            where = f"{name}({kind})" if kind else name
            found += [f"{where}.{key}={json.dumps(value)}" for key, value in defaults(one).items()]
    assert set(PINNED) <= set(found) and len(PINNED) > 150


def test_a_setting_that_is_at_its_default_enters_no_key() -> None:
    read = {"training": {"n_tokens": 100, "lr": 4e-4, "batch_size": 7, "resample_steps": []}, "seed": 0, "n_rows": 3}
    assert set_apart(read) == {"training": {"n_tokens": 100, "batch_size": 7}, "seed": 0, "n_rows": 3}
    topk = {
        "kind": "sae",
        "activation": "topk",
        "k": 4,
        "l1_coefficient": None,
        "expansion": 8,
        "sparsity": "unit_norm",
    }
    assert set_apart({"dictionary": topk}) == {
        "dictionary": {"kind": "sae", "activation": "topk", "k": 4, "sparsity": "unit_norm"}
    }
    assert with_defaults(set_apart({"dictionary": topk}))["dictionary"].items() >= topk.items()


def test_a_release_that_adds_settings_makes_nothing_stale(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = keys(plan_of(home, "dictionary=topk,relu,saelens/gated", "model.randomise=[none,reinit]"))
    grown = dataclasses.make_dataclass(
        "TrainingConfig",
        [("added", tuple[int, ...], dataclasses.field(default=()))],
        bases=(TrainingConfig,),
        frozen=True,
    )
    point = dataclasses.make_dataclass("PointConfig", [("training", grown)], bases=(PointConfig,), frozen=True)
    monkeypatch.setattr("saeflow.planning.expansion.PointConfig", point)
    monkeypatch.setitem(groups(), "training", grown)
    after = plan_of(home, "dictionary=topk,relu,saelens/gated", "model.randomise=[none,reinit]")
    assert keys(after) == before
    (first, *_) = after.stages["train"].values()
    assert first.config["training"]["added"] == []  # though a job reads it


# -------------------------------------------------------------------- names are no content
def test_what_a_user_renames_costs_nothing(home: Path, tmp_path: Path) -> None:
    before = keys(plan_of(home))
    shutil.copytree(home / "resources/model", tmp_path / "my model")
    shutil.copy(home / "resources/corpus.jsonl.gz", tmp_path / "another.name.jsonl.gz")
    renamed = ["model.name=other", f"model.path='{tmp_path}/my model'", "corpus.name='a corpus'"]
    assert keys(plan_of(home, *renamed, f"corpus.path={tmp_path}/another.name.jsonl.gz")) == before
    folder = tmp_path / "folder"
    folder.mkdir()
    shutil.copy(home / "resources/corpus.jsonl.gz", folder / "x.jsonl.gz")
    assert keys(plan_of(home, f"corpus.path={folder}")) == before  # a folder of one file
    (folder / "y.txt").write_text("more text")
    assert not set(keys(plan_of(home, f"corpus.path={folder}"))["train"]) & set(before["train"])
    (folder / "y.txt").rename(folder / "z.txt")
    more = keys(plan_of(home, f"corpus.path={folder}"))
    (folder / "z.txt").rename(folder / "z.jsonl")  # read otherwise
    assert not set(keys(plan_of(home, f"corpus.path={folder}"))["tokens"]) & set(more["tokens"])


def test_a_renamed_experiment_makes_its_figures_and_nothing_else(home: Path) -> None:
    one, other = keys(plan_of(home)), keys(plan_of(home, "experiment_name=other"))
    assert {stage for stage in one if one[stage] != other[stage]} == {"figures"}


# -------------------------------------------------------------------- folders
@pytest.mark.parametrize(
    "axis",
    [
        "dictionary.expansion=[2,8,16,32]",
        "dictionary=topk,batchtopk",
        "dictionary=topk,relu,saelens/topk,saelens/gated",
        "dictionary.normalize_activations=[none,expected_average_only_in]",
        "seed=[0,1,2]",
        "training.lr=[0.001,0.0010001,0.006]",
        "training.revive=[none,auxk,ghost]",
        "training.n_tokens=[300_000,614_400]",
        "tokens.train_tokens=[307_200,100_096]",
        "tokens.context_size=[128,256]",
        "tokens.prepend_bos=[true,false]",
        "activations.dtype=[float32,float16]",
        "model.fold_ln=[false,true]",
        "model.randomise=[none,reinit,permuted] model.randomise_seed=[0,1]",
        "corpus.sample_by=[document,line]",
        "site.layer=[0,1,2,3]",
        "site=mlp,mlp_with_residual,mlp_before_norm dictionary=transcoder model=sequential",
    ],
)
def test_whatever_a_sweep_varies_is_in_the_names_of_folders(home: Path, axis: str) -> None:
    if "sequential" in axis:
        config = json.loads((home / "resources/model/config.json").read_text())
        folder = home / "sequential"
        shutil.copytree(home / "resources/model", folder, dirs_exist_ok=True)
        (folder / "config.json").write_text(json.dumps(config | {"use_parallel_residual": False}))
        axis = axis.replace("model=sequential", f"model.path={folder}")
    plan = plan_of(home, *axis.split())
    assert len(plan.stages["train"]) > 1
    for stage in plan.stages:
        assert [name for name, n in Counter(names(plan, stage)).items() if n > 1] == [], stage


def test_a_value_more_renames_no_folder(home: Path) -> None:
    few = plan_of(home, "dictionary.expansion=[2,16]", "training.lr=0.001")
    many = plan_of(home, "dictionary.expansion=[2,16,32]", "training.lr=[0.001,0.002]", "seed=[0,1]")
    for stage in set(few.stages) - {"figures"}:
        assert few.stages[stage].keys() <= many.stages[stage].keys()


def test_a_folder_is_called_by_what_is_not_usual(home: Path) -> None:
    at = ["dictionary.k=8", "site.layer=1"]
    (usual,) = names(plan_of(home, *at), "train")
    assert re.fullmatch(r"sae-L1\.mlp_out-k8-seed0-4L128\.[0-9a-f]{4}-text\.[0-9a-f]{4}", usual)
    (wide,) = names(
        plan_of(home, "dictionary.k=8", "site.layer=1", "dictionary.expansion=16", "training.lr=1e-3"), "train"
    )
    assert wide == usual.replace("-k8-seed0", "-k8-x16-seed0") + "-lr0.001"


TEXT = st.text(max_size=300)


@given(TEXT, st.dictionaries(TEXT.map(lambda t: f"training.{t}"), TEXT.map(file_safe), max_size=30))
def test_names_are_safe_and_bounded(text: str, parts: dict[str, str]) -> None:
    name = joined(file_safe(text), parts)
    assert re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]*", name) and len(name) <= 60 + LONGEST + len("-etc")


def test_artifacts_tell_only_what_they_agree_on() -> None:
    assert merged([{"a": "x2", "b": "lr1"}, {"a": "x16", "b": "lr1"}]) == {"a": "", "b": "lr1"}
    assert joined("base", {"a": "", "b": "lr1"}) == "base-lr1"
    hostile = {"dictionary": {"kind": "sae", "activation": "saelens", "saelens": "gated", "options": {"a/b": "$(x)\n"}}}
    assert unusual(hostile, {})["dictionary.options"] == "a_b__x"


HOSTILE = [
    "../../x", "/tmp/x", "Org/x", "$(touch pwned)", "`touch pwned`", "a b;c", "-rf", "{x}", "{wildcards.key}", "a\nb",
    "ä海", "x" * 240, "it's", 'a"b', "<b>", "*", "a|b>c", "\x1b[2J", "a\\", "%(x)s", "~", ".", "..", "#",
]  # fmt: skip
SAFE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._+-]*(/[A-Za-z0-9_][A-Za-z0-9._+-]*)?")
"""What no shell changes, quoted or not, and `--wrap="..."` of sbatch neither; no option, and no way out of a folder."""


@pytest.mark.parametrize("name", HOSTILE)
def test_names_of_models_and_corpora_are_in_no_key(home: Path, name: str) -> None:
    named = plan_of(home, f"corpus.name={quoted(name)}", f"model.name={quoted(name)}")
    assert keys(named) == keys(plan_of(home))


@pytest.mark.parametrize("name", HOSTILE)
def test_a_name_of_an_experiment_is_refused_or_safe(home: Path, name: str) -> None:
    try:
        plan = plan_of(home, f"experiment_name={quoted(name)}", "blind={}", "dictionary.k=[8,16]")
    except ConfigError as error:
        assert str(error).startswith("experiment_name=") and "names folders" in str(error) and "\x1b" not in str(error)
        return
    assert name in ("ä海", "x" * 240)
    (key,) = plan.stages["figures"]
    assert all(SAFE.fullmatch(key) and len(key) < 240 for table in plan.stages.values() for key in table), key


def test_two_models_of_one_organisation_in_a_sweep(home: Path, tmp_path: Path) -> None:
    for number in (1, 2):
        folder = shutil.copytree(home / "resources/model", tmp_path / f"{number}")
        (folder / "config.json").write_text((folder / "config.json").read_text() + "\n" * number)
    blocks = ",".join(f"{{model.path:{tmp_path}/{n},model.name:EleutherAI/x{n},dictionary.k:[4,8]}}" for n in (1, 2))
    plan = compose(home / "conf", ["model=local", f"sweep=[{blocks}]"], results=str(tmp_path))
    assert len(plan.stages["activations"]) == 2 and len(plan.stages["train"]) == 4
    assert all(SAFE.fullmatch(key) for table in plan.stages.values() for key in table)


@pytest.mark.parametrize(
    "key", ["../x-1", "-x-1", "a b-1", "a;b-1", "$(x)-1", "a/../b-1", "x" * 240, "", "/x-1", "ä-1"]
)
def test_a_key_that_is_no_name_of_a_folder_is_refused(key: str) -> None:
    with pytest.raises(ConfigError, match="cannot be a folder's name"):
        check_names(key)


@given(TEXT, st.dictionaries(TEXT.map(lambda t: f"training.{t}"), TEXT.map(file_safe), max_size=30))
def test_however_long_what_a_dictionary_is_called_its_key_is_a_name(text: str, parts: dict[str, str]) -> None:
    base = "-".join([file_safe(text)] * 3)[:130]
    check_names(f"{joined(base, parts)}-01234567")
