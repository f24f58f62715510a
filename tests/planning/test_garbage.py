"""What nobody refers to is listed, and exactly that is removed; everything else stays, whatever happens meanwhile."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from stores import write_store
from tests.planning.test_plan import ROOT, SWEEP, finish, home  # noqa: F401 (home is a fixture)

from saeflow.config import ConfigError
from saeflow.planning import frozen
from saeflow.planning.expansion import compose
from saeflow.planning.garbage import LEFTOVERS, Listing, listing, measure, overview, remove
from saeflow.planning.graph import Plan
from saeflow.planning.history import FILE
from saeflow.planning.keeping import experiments_of, referred_to
from saeflow.planning.removal import remove as remove_plan
from saeflow.planning.stages import stages
from saeflow.storage.receipts import RECEIPT, set_aside

OTHER = "sweep={dictionary:relu,dictionary.l1_coefficient:[0.001,0.01]}"
SMALL = "tokens.train_tokens=1024"
RESULTS = Path("results")
LONG_AGO = 30 * 86400
HOST = socket.gethostname()


def age(folder: Path, seconds: float = LONG_AGO) -> None:
    for path in (folder, *folder.rglob("*")):
        then = time.time() - seconds
        os.utime(path, (then, then), follow_symlinks=False)


def plan_of(*overrides: str) -> Plan:
    return compose(Path("conf"), list(overrides), results="results", digests="digests.json")


@pytest.fixture
def mine(home: Path, monkeypatch: pytest.MonkeyPatch) -> Plan:  # noqa: F811
    """A folder whose only experiment, `mine`, is finished; beside it lies what a try with another L1 has left."""
    monkeypatch.chdir(home)
    shutil.rmtree("conf/experiment")
    Path("conf/experiment").mkdir()
    swept = "sweep:\n  dictionary: relu\n  dictionary.l1_coefficient: [0.001, 0.003]\n"
    Path("conf/experiment/mine.yaml").write_text(f"# @package _global_\nexperiment_name: mine\n{swept}")
    for plan in (plan_of(OTHER), plan_of("experiment=mine")):
        make(plan)
    return plan


def make(plan: Plan) -> None:
    for stage, table in plan.stages.items():
        finish(plan, stage, table)
    age(Path("results"))


def artifacts_of(*plans: Plan) -> set[str]:
    return {f"{stage}/{key}" for plan in plans for stage, table in plan.stages.items() for key in table}


def look(keep: str = "", without: Iterable[str] = (), days: float = 7.0) -> Listing:
    kept = referred_to(Path("conf"), RESULTS, experiments_of(keep), list(without), days, "digests.json")
    return listing(RESULTS, kept, days)


def names(found: Listing) -> set[str]:
    return {item.name for item in found.items}


def on_disk() -> set[str]:
    return {file.parent.relative_to("results").as_posix() for file in Path("results").rglob(RECEIPT)}


@contextmanager
def held(lock: Path) -> Iterator[None]:
    """A lock that another process holds."""
    code = f"from saeflow.storage.locks import Lock\nfrom pathlib import Path\nlock = Lock(Path({str(lock)!r}))"
    command = [sys.executable, "-c", f"{code}\nlock.acquire('it')\nprint('held', flush=True)\ninput()"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout and process.stdin and process.stdout.readline() == "held\n"
        yield
        process.kill()


# -------------------------------------------------------------------- what is listed
def test_what_no_experiment_needs_is_listed_with_its_size_and_exactly_that_removed(mine: Plan) -> None:
    found, other = look(), plan_of(OTHER)
    gone = artifacts_of(other) - artifacts_of(mine)
    assert names(found) == gone and {name.split("/")[0] for name in gone} == {"train", "evaluate", "figures"}
    size = sum(file.stat().st_size for name in gone for file in RESULTS.joinpath(name).rglob("*") if file.is_file())
    assert (found.size.n_bytes, found.size.n_files) == (size, 2 * len(gone))
    assert [item.stage for item in found.items] == ["figures", "evaluate", "train"]  # what was made of others first
    before = on_disk()
    assert [why for _, why in remove(found, found.token)] == [""] * len(gone)
    assert before - on_disk() == gone and on_disk() == artifacts_of(mine)
    assert not look().items and not [p for p in RESULTS.rglob("*") if p.name.endswith((".lock", ".partial"))]
    assert plan_of("experiment=mine").to_make == {stage: [] for stage in stages()}


def test_of_a_few_edits_exactly_what_the_plans_do_not_have_is_listed(mine: Plan) -> None:
    """Plans of other packings, models and stages share less and less with `mine`."""
    tries = [plan_of(OTHER), *(plan_of(SWEEP, one) for one in ("seed=1", SMALL, "evaluation.resamples=100"))]
    for plan in tries:
        make(plan)
    assert names(look()) == artifacts_of(*tries) - artifacts_of(mine)
    assert names(look(keep=f"{SWEEP} seed=1; {SWEEP} {SMALL}")) == artifacts_of(*tries) - artifacts_of(
        mine, *tries[1:3]
    )


def test_what_is_damaged_and_of_no_experiment_is_listed_and_its_needs_are_known(mine: Plan) -> None:
    (training,) = plan_of(OTHER).stages["train"].keys() - mine.stages["train"].keys()
    set_aside(RESULTS / "train" / training)
    (RESULTS / "figures" / next(iter(mine.stages["figures"])) / RECEIPT).write_text("torn")
    assert f"train/{training}" in names(look())
    assert names(look()) == artifacts_of(plan_of(OTHER)) - artifacts_of(mine)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("", []),
        ("experiment=a k=[1, 2]; seed=1 ;", [["experiment=a", "k=[1, 2]"], ["seed=1"]]),
        ("corpus.path='/data/a;b.jsonl' seed=1;seed=2", [["corpus.path='/data/a;b.jsonl'", "seed=1"], ["seed=2"]]),
    ],
)
def test_experiments_stand_between_semicolons(text: str, found: list[list[str]]) -> None:
    assert experiments_of(text) == found


def test_an_experiment_to_keep_that_cannot_be_planned_ends_it(mine: Plan) -> None:
    with pytest.raises(ConfigError, match=r'KEEP="seeed=1" cannot be planned: .*seeed'):
        look(keep="seeed=1")


def test_what_was_made_lately_stays_with_what_it_needs(mine: Plan) -> None:
    other = plan_of(OTHER)
    (training,) = other.stages["train"].keys() - mine.stages["train"].keys()
    os.utime(RESULTS / "train" / training / RECEIPT)
    assert f"train/{training}" not in names(look()) and f"train/{training}" in names(look(days=0))
    (evaluation,) = other.stages["evaluate"].keys() - mine.stages["evaluate"].keys()
    age(RESULTS / "train")
    os.utime(RESULTS / "evaluate" / evaluation / RECEIPT)
    assert {name.split("/")[0] for name in names(look())} == {"figures"}


# -------------------------------------------------------------------- runs
def test_plans_of_runs_keep_what_they_have_while_they_are_recent_or_unfinished(mine: Plan) -> None:
    other = plan_of(OTHER)
    file = frozen.freeze_run(other)
    assert not names(look())
    os.utime(file, (time.time() - LONG_AGO,) * 2)
    gone = names(look())
    assert gone == artifacts_of(other) - artifacts_of(mine)
    missing = {name for name in gone if not name.startswith("train")}
    for name in missing:
        shutil.rmtree(RESULTS / name)
    file.unlink()
    file = frozen.freeze_run(plan_of(OTHER))  # has an evaluation to make, which may wait in a queue for weeks
    os.utime(file, (time.time() - LONG_AGO,) * 2)
    assert not names(look())
    os.utime(file, (time.time() - 61 * 86400,) * 2)
    assert names(look()) == gone - missing


@pytest.mark.parametrize("torn", ["", "{}", '{"stages": []', '{"stages": {"train": 1}, "to_make": {}}'])
def test_a_plan_that_cannot_be_read_ends_it(mine: Plan, torn: str) -> None:
    frozen.freeze_run(mine).write_text(torn)
    with pytest.raises(ConfigError, match=r"nothing may be removed: \.snakemake/plans/\w+\.json"):
        look()


def test_what_is_being_made_stays_with_what_it_needs(mine: Plan) -> None:
    other = plan_of(OTHER)
    (evaluation,) = other.stages["evaluate"].keys() - mine.stages["evaluate"].keys()
    with held(RESULTS / "evaluate" / f"{evaluation}.lock"):
        assert {name.split("/")[0] for name in names(look())} == {"figures"}
    assert {name.split("/")[0] for name in names(look())} == {"figures", "evaluate", "train"}
    with held(RESULTS / "evaluate" / "something.lock"), pytest.raises(ConfigError, match=r"process \d+ on .* holds"):
        look()


# -------------------------------------------------------------------- experiments that cannot be planned here
def made_for(**experiments: Iterable[str]) -> None:
    lines = [
        json.dumps({"experiment": one, "stage": name.split("/", 1)[0], "key": name.split("/", 1)[1]})[:-1]
        + ', "seconds": 1, "work": 1}\n'
        for one, found in experiments.items()
        for name in found
    ]
    (RESULTS / FILE).write_text("".join(lines))


def test_an_experiment_that_cannot_be_planned_keeps_what_may_be_its(mine: Plan) -> None:
    text = Path("conf/experiment/mine.yaml").read_text()
    away = text.replace("experiment_name: mine", "experiment_name: away_from_here")
    Path("conf/experiment/away.yaml").write_text(f"{away}model:\n  path: /nowhere\n")
    gone = artifacts_of(plan_of(OTHER)) - artifacts_of(mine)
    assert not names(look())  # nobody knows whose they are
    assert names(look(without=["away"])) == gone
    made_for(mine=gone)
    assert names(look()) == gone
    evaluation = next(name for name in gone if name.startswith("evaluate"))
    made_for(mine=gone - {evaluation}, away_from_here=[evaluation])
    assert {name.split("/")[0] for name in names(look())} == {"figures"}
    said = overview(look(), "make gc")
    assert "experiment=away cannot be planned here: model.path=/nowhere" in said
    assert 'make gc WITHOUT="away"' in said and "kept: 2: may be of away" in said
    Path("conf/experiment/away.yaml").write_text("experiment_name: [")  # not even its name can be read
    assert not names(look())
    with pytest.raises(ConfigError, match="WITHOUT=mine: name experiments that cannot be planned here: away"):
        look(without=["mine"])


# -------------------------------------------------------------------- the token, and what happens meanwhile
def test_nothing_is_removed_by_the_token_of_another_list(mine: Plan) -> None:
    first, before = look(), on_disk()
    folder = RESULTS / first.items[0].name
    (folder / "more.txt").write_text("more")
    assert look().token != first.token
    (folder / "more.txt").unlink()
    age(folder)
    with pytest.raises(ConfigError, match="nothing was removed"):
        list(remove(look(), "0" * 12))
    with pytest.raises(ConfigError, match="nothing was removed"):
        list(remove(look(keep=OTHER), first.token))
    assert on_disk() == before


def test_what_another_process_holds_has_changed_or_wants_is_left(mine: Plan) -> None:
    make(plan_of(SWEEP, "seed=1"))
    found = look()
    evaluations = [item for item in found.items if item.stage == "evaluate"]
    trainings = [item for item in found.items if item.stage == "train"]
    assert len(evaluations) == 3 and len(trainings) == 3
    (RESULTS / evaluations[0].name / "more.txt").write_text("more")
    with held(RESULTS / f"{trainings[0].name}.lock"):
        left = {item.name: why for item, why in remove(found, found.token) if why}
    assert left.keys() == {evaluations[0].name, trainings[0].name}
    assert left[evaluations[0].name] == "it has changed meanwhile" and "process" in left[trainings[0].name]
    assert on_disk() == artifacts_of(mine) | left.keys()


def test_what_a_run_refers_to_that_began_after_the_list_is_left(mine: Plan) -> None:
    found, other = look(), plan_of(OTHER)
    frozen.freeze_run(other)
    whys = {why for _, why in remove(found, found.token)}
    assert whys == {"a run that began meanwhile refers to it"} and on_disk() == artifacts_of(mine, other)


# -------------------------------------------------------------------- stores
def columns(mine: Plan) -> tuple[Path, Path]:
    """Real shards below the store of `mine`, of its own hook and of another that nobody refers to."""
    (key,) = mine.stages["activations"]
    hook, column = mine.stages["activations"][key].config["hook_name"], RESULTS / "activations" / key
    store, stray = column.parent, column.parent / "L0.mlp_out-8rows-01234567"
    shutil.rmtree(store)
    values = {name: torch.ones(64, 4) for name in (hook, "blocks.0.hook_mlp_out")}
    geometry = {"chunk_tokens": 16, "shard_tokens": 32}
    for (_, made), folder in zip(values.items(), write_store(store, values, **geometry), strict=True):
        assert made.shape == (64, 4)
        folder.folder.rename(column if folder.hook_name == hook else stray)
    age(store)
    return column, stray


def test_with_a_column_go_the_shards_that_no_other_has(mine: Plan) -> None:
    column, stray = columns(mine)
    store = column.parent
    array = store / "activations.zarr" / "blocks.0.hook_mlp_out"
    (item,) = (item for item in look().items if item.stage == "activations")
    assert item.paths == (stray, array, store / "progress" / "blocks.0.hook_mlp_out.safetensors")
    n_bytes = sum(file.stat().st_size for path in item.paths for file in (path, *path.rglob("*")) if file.is_file())
    assert item.size.n_bytes == n_bytes > 64 * 16
    found = look()
    assert not any(why for _, why in remove(found, found.token))
    assert not array.exists() and not stray.exists() and column.is_dir()
    assert len(list((store / "activations.zarr").glob("blocks.*"))) == 1 and not look().items


def test_with_the_last_column_goes_the_store_unless_one_is_still_to_be_made_of_it(mine: Plan) -> None:
    column, stray = columns(mine)
    shutil.rmtree(column)  # a killed job had begun it: its shards are there
    hook = next(iter(mine.stages["activations"].values())).config["hook_name"]
    found = look()
    assert not any(why for _, why in remove(found, found.token)) and not stray.exists()
    assert (column.parent / "activations.zarr" / hook / "c").is_dir()
    Path("conf/experiment/mine.yaml").unlink()
    make_other = next(item for item in look().items if item.name.endswith(column.parent.name))
    assert (make_other.stage, make_other.paths, make_other.why) == (LEFTOVERS, (column.parent,), "it holds no artifact")
    columns(mine)
    found = look()
    with held(column.parent / ".lock"):
        left = {item.name for item, why in remove(found, found.token) if "holds" in why}
        assert len(left) == 2 and column.parent.is_dir()
    found = look()
    assert not any(why for _, why in remove(found, found.token)) and not column.parent.exists()


def test_a_dry_removal_of_a_plan_says_what_a_real_one_removes(mine: Plan) -> None:
    column, stray = columns(mine)
    shutil.copytree(column, column.with_name("L2.mlp_out-8rows-89abcdef"))
    said, really = list(remove_plan(mine, dry=True)), list(remove_plan(mine))
    assert said == really and stray.is_dir()
    assert {f"{path.parent.name}/{path.name}" for path in said} == {
        name if name.count("/") == 1 else name.split("/", 1)[1] for name in artifacts_of(mine)
    }
    shutil.rmtree(stray.with_name("L2.mlp_out-8rows-89abcdef"))
    shutil.rmtree(stray)
    for path in remove_plan(mine, dry=True):
        assert path == column.parent
    assert list(remove_plan(mine)) == [column.parent]


# -------------------------------------------------------------------- leftovers
def dead_process() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_what_killed_jobs_have_left_is_listed_and_what_others_write_or_go_on_with_is_not(mine: Plan) -> None:
    (training, *_), (column,) = mine.stages["train"], mine.stages["activations"]
    store, dead = Path("results/activations") / column.split("/")[0], dead_process()
    gone = [
        f"train/{training}.{HOST}-{dead}.partial",
        f"train/{training}.old.{HOST}-{dead}.partial",
        "evaluate/gone.elsewhere-77.partial",
        f"{store.relative_to('results')}/activations.zarr/blocks.1.hook_mlp_out/c/0.{HOST}-{dead}.partial",
        "train/half_removed-01234567",
        "checkpoints/nothing-01234567",
        f"{store.relative_to('results')}/progress/blocks.0.hook_mlp_out.safetensors",
    ]
    hook = mine.stages["activations"][column].config["hook_name"]
    short = hook.replace("blocks.", "L").replace("hook_", "")
    assert column.split("/")[1].startswith(short)
    (store / "activations.zarr" / hook).mkdir(parents=True)
    stay = [
        f"train/{training}.{HOST}-{os.getpid()}.partial",
        "evaluate/young.elsewhere-77.partial",
        f"checkpoints/{training}",
        "checkpoints/young-01234567",
        f"{store.relative_to('results')}/progress/{hook}.safetensors",
    ]
    for name in (*gone, *stay):
        path = RESULTS / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if name.startswith(("train", "checkpoints", "evaluate")):
            path.mkdir()
            (path / "file").write_text("something")
            age(path, 0 if "young" in name else LONG_AGO)
        else:
            path.write_text("something")
            age(path)
    gone[3] = f"{store.relative_to('results')}/activations.zarr/blocks.1.hook_mlp_out"  # an array of no column
    age(RESULTS / gone[3])
    found = [item for item in look().items if item.stage == LEFTOVERS]
    assert {str(item.paths[0]) for item in found} == {f"results/{name}" for name in gone}
    listed = look()
    assert not any(why for _, why in remove(listed, listed.token))
    assert not [name for name in gone if (RESULTS / name).exists()] and all((RESULTS / name).exists() for name in stay)


def test_what_was_made_ahead_goes_with_what_it_is_of(mine: Plan) -> None:
    (column,), tokens = mine.stages["activations"], next(iter(mine.stages["tokens"]))
    store, hook = RESULTS / "activations" / column.split("/")[0], mine.stages["activations"][column].config["hook_name"]
    shutil.rmtree(RESULTS / "activations" / column)  # it was not joined yet
    ready = {
        "mine": [store / "parts" / hook, RESULTS / "tokens" / f"{tokens}.parts"],
        "nobody's": [store / "parts" / "blocks.0.hook_mlp_out", RESULTS / "tokens" / "train-8rows-01234567.parts"],
    }
    for folder in (*ready["mine"], *ready["nobody's"]):
        folder.mkdir(parents=True)
        (folder / "0").write_text("something")
        age(folder)
    assert {item.paths[0] for item in look().items if item.stage == LEFTOVERS} == {*ready["nobody's"]}
    for lock in (store / ".shard-0.lock", RESULTS / "tokens" / f"{tokens}.part-1-of-2.lock"):
        with held(lock):
            found = look()  # what a part is being made of is known
            with pytest.raises(ConfigError, match=r"nothing was removed: process \d+ on .* makes results"):
                list(remove_plan(mine))
    with held(store / ".shard-0.lock"):
        left = [item.paths[0] for item, why in remove(found, found.token) if why]
    assert left == ready["nobody's"][:1] and all(folder.is_dir() for folder in ready["mine"])
    assert {*ready["mine"][1:], store} <= {*remove_plan(mine)}
    assert not any(folder.exists() for folder in ready["mine"])


def test_links_are_not_followed(mine: Plan, tmp_path: Path) -> None:
    away = tmp_path / "away"
    shutil.move("results/train", away / "train")
    shutil.move("results/evaluate", away / "evaluate")
    Path("results/train").symlink_to(away / "train")
    Path("results/evaluate").mkdir()
    other = plan_of(OTHER)
    (evaluation,) = other.stages["evaluate"].keys() - mine.stages["evaluate"].keys()
    Path("results/evaluate", evaluation).symlink_to(away / "evaluate" / evaluation)
    column, stray = columns(mine)
    array = column.parent / "activations.zarr" / "blocks.0.hook_mlp_out"
    shutil.move(array, away / "array")
    array.symlink_to(away / "array")
    age(RESULTS), age(away)
    before = measure([away])
    found = look()
    assert {item.stage for item in found.items} == {"figures", "activations"}
    assert found.links == [Path("results/train"), Path("results/evaluate", evaluation)]
    (of_column,) = (item for item in found.items if item.stage == "activations")
    assert of_column.paths == (stray, column.parent / "progress" / "blocks.0.hook_mlp_out.safetensors")
    assert not any(why for _, why in remove(found, found.token))
    assert measure([away]) == before and before.n_files > 10 and array.is_symlink()


# -------------------------------------------------------------------- as it is called
def test_the_list_names_the_command_that_removes_it(mine: Plan) -> None:
    def call(*options: str) -> subprocess.CompletedProcess:
        command = [sys.executable, ROOT / "scripts" / "gc.py", "--conf", "conf", "--directory", ".", *options]
        return subprocess.run(command, capture_output=True, text=True)

    gone, before = names(look()), on_disk()
    said = call("--keep", "seed=7", "--days", "3")
    assert said.returncode == 0 and on_disk() == before
    assert all(name in said.stdout for name in gone) and "nothing was removed" in said.stdout
    last = said.stdout.splitlines()[-1]
    (token,) = re.findall(r"^make gc KEEP=seed=7 DAYS=3 REMOVE=(\w{12})$", last)
    refused = call("--days", "3", "--remove", "000000000000")
    assert refused.returncode == 1 and "nothing was removed" in refused.stderr and on_disk() == before
    done = call("--days", "3", "--remove", token)
    assert done.returncode == 0 and on_disk() == before - gone
    assert re.search(r"^freed [\d.]+ (kB|bytes)$", done.stdout, re.MULTILINE)
    assert "nothing below results/ may go" in call("--days", "3").stdout
