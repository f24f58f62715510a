"""The workflow through Snakemake itself: a tiny experiment is run once, then dry runs say what each edit would redo."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from filelock import FileLock

ROOT = Path(__file__).resolve().parent.parent
CORPUS = "conf/corpus/embedded.yaml"
TINY = (
    "tokens.context_size=32 tokens.train_tokens=4096 tokens.held_out_tokens=1024 tokens.held_out_fraction=0.3 "
    "activations.chunk_tokens=256 activations.shard_tokens=1024 activations.batch_rows=8 "
    "training.n_tokens=4096 training.batch_size=256 training.lr_warm_up_steps=2 training.lr_decay_steps=2 "
    "training.l1_warm_up_steps=2 training.log_every=4 jacobian.n_tokens=256 dictionary.expansion=2 site.layer=1"
)
SWEEP = (
    "sweep=[{dictionary:relu,site:mlp_out,dictionary.l1_coefficient:[0.001,0.003]},"
    "{dictionary:pair,site:mlp,dictionary.k:4}]"
)


class Workflow:
    """A working directory with its own conf/ and resources/, and Snakemake called on the repository's Snakefile."""

    def __init__(self, home: Path, cores: int = 2) -> None:
        self.home, self.cores = home, cores

    def command(self, *options: str, hydra: str = "", sweep: str = SWEEP) -> list[str]:
        command = [sys.executable, "-m", "snakemake", "-s", str(ROOT / "Snakefile"), "--directory", str(self.home)]
        config = [f"conf={self.home}/conf", f"hydra={sweep} {TINY} {hydra}"]
        return [*command, "--cores", str(self.cores), *options, "--config", *config]

    def call(self, *options: str, hydra: str = "", sweep: str = SWEEP) -> subprocess.CompletedProcess:
        return subprocess.run(
            self.command(*options, hydra=hydra, sweep=sweep), cwd=self.home, capture_output=True, text=True
        )

    def run(self, hydra: str = "", sweep: str = SWEEP) -> str:
        """Runs it, and returns what the terminal showed."""
        done = self.call(hydra=hydra, sweep=sweep)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout + done.stderr

    def script(self, name: str, *arguments: str) -> subprocess.CompletedProcess:
        """Calls one of scripts/ from another folder, for this directory."""
        command = [sys.executable, str(ROOT / "scripts" / name), "--conf", str(self.home / "conf")]
        command += ["--directory", str(self.home), *arguments]
        return subprocess.run(command, cwd="/", capture_output=True, text=True)

    def would_run(self, *options: str, hydra: str = "", sweep: str = SWEEP) -> dict[str, int]:
        """Jobs of a dry run by stage, without the collecting rule."""
        done = self.call("-n", *options, hydra=hydra, sweep=sweep)
        assert done.returncode == 0, done.stdout + done.stderr
        table = dict(re.findall(r"^(\w+) +(\d+)$", done.stdout + done.stderr, re.MULTILINE))  # it is printed twice
        counts = {rule: int(n) for rule, n in table.items() if rule not in ("all", "total")}
        assert counts or "Nothing to be done" in done.stdout + done.stderr
        return counts


def contents(home: Path) -> dict[str, bytes]:
    """Bytes of every file of every artifact, but for what says when, where and how fast it was made."""
    root = home / "results"
    return {
        str(p.relative_to(root)): p.read_bytes()
        for p in sorted(root.glob("*/**/*"))
        if p.is_file() and p.name != "provenance.json" and p.suffix != ".lock"
    }


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory, neox_folder: Path, corpus_file: Path) -> Path:
    """A working directory in which the tiny experiment has run; never written to by a test. It runs once, and all
    workers have copies."""
    base = tmp_path_factory.getbasetemp()
    run = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "finished"
    begun = run.with_name("begun")
    with FileLock(f"{run}.lock"):
        if not run.exists():
            shutil.rmtree(begun, ignore_errors=True)  # of a worker whose run failed
            fill(begun, neox_folder, corpus_file)
            (begun / "terminal.txt").write_text(Workflow(begun).run())
            begun.rename(run)
    home = tmp_path_factory.mktemp("workflow")
    shutil.copytree(run, home, dirs_exist_ok=True)
    moved(home, begun, "terminal.txt", CORPUS)
    return home


def moved(home: Path, before: Path, *names: str) -> None:
    """Of files that name the folder that they were in before, makes them name `home`."""
    for name in names:
        file = home / name
        file.write_text(file.read_text().replace(str(before), str(home)))


def fill(home: Path, model: Path, corpus: Path) -> None:
    shutil.copytree(ROOT / "conf", home / "conf")
    shutil.copytree(model, home / "resources" / "model")
    (home / CORPUS).write_text(f"name: tiny\npath: {home}/resources/{corpus.name}\n")
    shutil.copy(corpus, home / "resources")


@pytest.fixture
def home(finished: Path, tmp_path: Path) -> Path:
    """The finished working directory in which a test may edit conf/ and resources/; results are shared, for reading."""
    for name in ("conf", "resources", ".snakemake"):
        shutil.copytree(finished / name, tmp_path / name)
    moved(tmp_path, finished, CORPUS)
    (tmp_path / "results").symlink_to(finished / "results")
    return tmp_path


@pytest.mark.slow
def test_second_run_has_nothing_to_do(home: Path) -> None:
    assert Workflow(home).would_run() == {}


def test_the_snakefile_that_the_catalogue_looks_for_is_the_same_workflow(home: Path) -> None:
    assert Workflow(home).would_run("-s", str(ROOT / "workflow/Snakefile")) == {}
    catalogue = yaml.safe_load((ROOT / ".snakemake-workflow-catalog.yml").read_text())
    assert catalogue["usage"]["mandatory-flags"]["flags"].startswith("--config hydra=")
    assert (ROOT / "config/README.md").is_file()


def test_an_environment_that_jobs_would_not_use_is_refused(home: Path) -> None:
    done = Workflow(home).call("-n", "--sdm", "conda")
    assert done.returncode != 0
    assert "refused: --sdm has no effect here: every job runs in the environment that runs snakemake" in done.stdout


def test_one_more_l1_value_runs_one_training_one_evaluation_and_the_figures(home: Path) -> None:
    more = SWEEP.replace("0.003", "0.003,0.01")
    assert Workflow(home).would_run(sweep=more) == {"train": 1, "evaluate": 1, "figures": 1}


def test_how_it_runs_and_how_it_is_written_rerun_nothing(home: Path) -> None:
    file = home / "conf/dictionary/relu.yaml"
    lines = [line for line in file.read_text().splitlines() if line]
    file.write_text("# reworded\n" + "\n".join(reversed(lines)) + "\n")
    (home / "resources/model/model.safetensors").touch()
    how = "device=cuda device.train=cuda:1 device.threads.train=3"
    assert Workflow(home, cores=1).would_run(hydra=how) == {}


@pytest.mark.parametrize(
    ("hydra", "jobs"),
    [
        (
            "tokens.context_size=16",
            {"tokens": 2, "activations": 1, "train": 1, "jacobian": 1, "baseline": 1, "evaluate": 1},
        ),
        (
            "tokens.prepend_bos=false",
            {"tokens": 2, "activations": 1, "train": 1, "jacobian": 1, "baseline": 1, "evaluate": 1},
        ),
        ("activations.dtype=float16", {"activations": 1, "train": 1, "jacobian": 1, "baseline": 1, "evaluate": 1}),
        ("model.randomise=permuted", {"activations": 1, "train": 1, "jacobian": 1, "baseline": 1, "evaluate": 1}),
        ("jacobian.bins=50", {"jacobian": 1}),
    ],
)
def test_an_edit_runs_exactly_its_descendants(home: Path, hydra: str, jobs: dict[str, int]) -> None:
    assert Workflow(home).would_run(hydra=hydra) == jobs | {"figures": 1}


def test_one_target_prints_the_table_of_every_study(home: Path) -> None:
    done = Workflow(home).call("jacobian_tables")
    (folder,) = (home / "results" / "jacobian").iterdir()
    assert (folder / "table.txt").read_text() in done.stdout
    assert len(re.findall(r"^There are [0-9.]+ values and above 0\.[0-9]{3}\.$", done.stdout, re.MULTILINE)) == 19


def test_one_bit_of_the_weights_runs_everything_that_reads_them(home: Path) -> None:
    weights = home / "resources/model/model.safetensors"
    held = bytearray(weights.read_bytes())
    held[-1] ^= 1
    weights.write_bytes(held)
    expected = {"activations": 1, "train": 1, "jacobian": 1, "baseline": 1, "evaluate": 1, "figures": 1}
    assert Workflow(home).would_run() == expected


def test_every_artifact_tells_where_it_came_from(finished: Path) -> None:
    receipts = list((finished / "results").rglob("provenance.json"))
    assert len(receipts) == 2 + 2 + 4 + 1 + 2 + 4 + 1
    for receipt in receipts:
        held = json.loads(receipt.read_text())
        assert receipt.with_name("config.yaml").is_file()
        assert receipt.parent.as_posix().endswith(f"results/{held['stage']}/{held['key']}")
        assert held["wall_s"] > 0 and held["peak_memory_bytes"] > 0 and held["packages"]["torch"]
        for stage, keys in held["needs"].items():
            assert all((finished / "results" / stage / key / "provenance.json").is_file() for key in keys)


def test_plan_script_says_what_would_run_and_why(home: Path) -> None:
    script = [sys.executable, str(ROOT / "scripts/plan.py"), "--conf", str(home / "conf")]
    more = SWEEP.replace("0.003", "0.003,0.01")
    said = subprocess.run([*script, f"{more} {TINY}"], cwd=home, capture_output=True, text=True, check=True).stdout
    assert "1 training, 1 evaluation, 1 set of figures: dictionary.l1_coefficient=0.01 is new" in said
    assert "0 activation columns, 0 bytes to cache" in said
    said = subprocess.run([*script, f"{SWEEP} {TINY}"], cwd=home, capture_output=True, text=True, check=True).stdout
    assert "nothing to do" in said


def test_the_terminal_shows_a_line_a_job_and_where_to_look(finished: Path) -> None:
    lines = (finished / "terminal.txt").read_text().splitlines()
    (figures,) = (finished / "results/figures").iterdir()
    assert max(map(len, lines)) < 1000 and len(lines) < 25  # SWEEP and TINY stand in the last one
    jobs = [line for line in lines if line.startswith("[")]
    assert "8 jobs to do: 2 tokens, 1 " in "\n".join(lines)
    assert [line.partition("]")[0] for line in jobs] == [f"[{n + 1} of 8" for n in range(8)]
    assert any(
        re.search(r"\] train 4 \(sae .*seed0.*\): .*: 4,096 tokens, L0 4\.0 to [\d.]+, .*\(\d", line) for line in jobs
    )
    assert any(
        re.search(r"\] tokens train-128rows-\S+: wrote 128 rows of 32 tokens from \d+ documents \(", j) for j in jobs
    )
    assert lines[-5].startswith("done in ")
    assert lines[-4].startswith(f"figures: results/figures/{figures.name}/ (jacobian_histogram, sparsity_faithfulness,")
    assert lines[-3].startswith("tables:  ") and "evaluations.csv" in lines[-3]
    assert lines[-2].startswith(f"report:  none of these yet: make report DIRECTORY={finished} HYDRA='sweep=")
    assert lines[-1] == f"page:    {(finished / 'results/index.html').as_uri()}"
    assert "sparsity faithfulness" in (finished / "results/index.html").read_text()


def test_files_have_the_mode_that_the_umask_leaves(finished: Path) -> None:
    mask = os.umask(0)
    os.umask(mask)
    files = [p for p in (finished / "results").rglob("*") if p.is_file()]
    assert any(p.suffix == ".safetensors" for p in files)
    assert {oct(p.stat().st_mode & 0o777) for p in files} == {oct(0o666 & ~mask)}


def test_the_reason_of_a_failure_comes_once_and_last(finished: Path, home: Path) -> None:
    (home / "results").unlink()
    shutil.copytree(finished / "results", home / "results")
    sweep = "sweep={dictionary:relu,site:mlp_out,dictionary.l1_coefficient:1e39}"
    done = Workflow(home).call(sweep=sweep)
    said = done.stdout + done.stderr
    assert done.returncode != 0 and "Traceback" not in said and "job.py" not in said
    assert said.count("lower training.lr") == 1
    *_, before, last = said.strip().splitlines()
    assert before.startswith("1 of ") and before.endswith("the same command goes on from here")
    assert last.startswith("train failed: ") and "(log: logs/train/" in last
    page = (home / "results/index.html").read_text()
    assert "1 training, 1 evaluation, 1 set of figures that the last run was to make" in page


def test_report_of_a_run_in_another_directory(finished: Path, home: Path) -> None:
    (home / "results").unlink()
    shutil.copytree(finished / "results", home / "results")
    done = Workflow(home).script("report.py", f"{SWEEP} {TINY}")
    assert done.returncode == 0, done.stdout + done.stderr
    assert list((home / "results/ledger").glob("*.parquet"))
    assert "What each stage made, by name" in (home / "results/report.html").read_text()
    *_, report, page = done.stdout.splitlines()
    assert (home / "results/report.html").is_file() and report == "report:  results/report.html"
    assert page == f"page:    {(home / 'results/index.html').as_uri()}"
    assert 'href="report.html"' in (home / "results/index.html").read_text()
    opened = Workflow(home).script("open.py")
    assert opened.returncode == 0 and opened.stdout == f"no browser opens here: {page.removeprefix('page:    ')}\n"


def test_relative_paths_and_odd_names_are_read_alike_by_all(home: Path) -> None:
    """Relative to the directory of the run; `make plan`, the scripts and Snakemake take one text."""
    folder = home / "it's (a) b=c,d#e ~ä {x} & more"
    (home / "resources").rename(folder)
    corpus = next(folder.glob("corpus*")).name
    name = folder.name.replace("'", "\\'")
    paths = f"model.path='{name}/model' corpus.path='{name}/{corpus}'"
    assert Workflow(home).would_run(hydra=paths) == {}
    done = Workflow(home).script("plan.py", f"{SWEEP} {TINY} {paths}")
    assert "nothing to do" in done.stdout, done.stdout + done.stderr
    bare = f"corpus.path={folder.name.replace(' ', '')}/{corpus}"
    for done in (Workflow(home).call("-n", hydra=bare), Workflow(home).script("plan.py", f"{SWEEP} {TINY} {bare}")):
        assert done.returncode != 0 and "needs quotes around it: corpus.path=" in done.stdout + done.stderr


def test_what_fell_outside_of_the_quotes_stops_before_any_job(home: Path) -> None:
    for stray in ("dictionary=topk", "dictionary.k=8"):
        command = Workflow(home).command("-n")
        done = subprocess.run([*command, stray], cwd=home, capture_output=True, text=True)
        assert done.returncode != 0
        assert "inside the quotes" in done.stderr + done.stdout and "Traceback" not in done.stderr


def test_bad_configuration_stops_before_any_job(home: Path) -> None:
    done = Workflow(home).call("-n", hydra="dictionary.l1_coeficient=1")
    assert done.returncode != 0
    assert "did you mean dictionary.l1_coefficient" in done.stderr + done.stdout
    assert "Traceback" not in done.stderr


def test_plan_that_the_disk_cannot_hold_is_refused(
    home: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = tmp_path_factory.mktemp("full")
    (full / "sitecustomize.py").write_text(
        "import shutil\nshutil.disk_usage = lambda path: shutil._ntuple_diskusage(1, 1, 0)\n"
    )
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(full), os.environ.get("PYTHONPATH", "")]))
    done = Workflow(home).call("-n", hydra="tokens.context_size=16")
    assert done.returncode != 0
    assert "the disk cannot hold this plan" in done.stderr + done.stdout


@pytest.mark.slow
def test_two_runs_at_once_share_what_both_want(tmp_path: Path, neox_folder: Path, corpus_file: Path) -> None:
    """One folder, two experiments: the second starts while the first works, and neither does what the other has."""
    fill(tmp_path, neox_folder, corpus_file)
    sweeps = [f"sweep={{dictionary:topk,dictionary.k:[{k}]}}" for k in ("2,4", "4,8")]
    commands = [
        Workflow(tmp_path, cores=1).command(hydra=f"experiment_name={name}", sweep=sweep)
        for name, sweep in zip(("one", "two"), sweeps, strict=True)
    ]
    runs = []
    for command in commands:
        runs.append(
            subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        )
        while runs[0].poll() is None and not list((tmp_path / "logs").rglob("*.log")):
            time.sleep(0.1)
    told = [run.communicate()[0] for run in runs]
    assert [run.returncode for run in runs] == [0, 0], "\n".join(told)
    made = [json.loads(line) for line in (tmp_path / "results/made.jsonl").read_text().splitlines()]
    assert len(made) == len({(m["stage"], m["key"]) for m in made}) == 2 + 1 + 3 + 1 + 3 + 2
    plans = list((tmp_path / ".snakemake/plans").glob("*.json"))
    assert len(plans) == 2
    assert not list((tmp_path / "results").rglob("*.lock"))


@pytest.mark.slow
def test_a_stage_is_forced_to_the_same_bytes_though_a_clock_was_ahead(finished: Path, home: Path) -> None:
    """What it is made from seems to be two hours younger than what it makes. Every artifact of it is made, and of what
    follows, though a job has several."""
    (home / "results").unlink()
    shutil.copytree(finished / "results", home / "results")
    shutil.rmtree(home / ".snakemake")
    receipts = {p.parent: p.read_bytes() for p in (home / "results").rglob("provenance.json")}
    for folder in receipts:
        os.utime(folder / "provenance.json", (time.time() + 7200,) * 2)
    done = Workflow(home).call("--forcerun", "train")
    assert done.returncode == 0, done.stdout + done.stderr
    anew = {folder for folder, held in receipts.items() if (folder / "provenance.json").read_bytes() != held}
    assert anew == {f for f in receipts if {"train", "jacobian", "evaluate", "figures"} & {*f.relative_to(home).parts}}
    assert contents(home) == contents(finished)
    ahead = [p for p in (home / "results/activations").rglob("provenance.json") if p.stat().st_mtime > time.time()]
    assert not ahead and Workflow(home).would_run() == {}
