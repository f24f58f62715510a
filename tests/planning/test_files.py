"""Files of conf/ that cannot be what their author meant: one sentence with file and line, whatever asks for them."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from saeflow.config import ConfigError
from saeflow.planning.expansion import compose
from saeflow.planning.files import read

ROOT = Path(__file__).resolve().parents[2]
HEAD = "# @package _global_\n"
LAUGHS = "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 12))
WRONG = {
    "tab": (HEAD + "sweep:\n\tdictionary: topk\n", "line 3: a tab, .* put spaces"),
    "tab_below_a_key": (HEAD + "tokens:\n  context_size: 64\n\ttrain_tokens: 4096\n", "line 4: a tab, .* put spaces"),
    "unclosed": (HEAD + "sweep: {dictionary: topk\n", "line 3: .* ',' or '}' .of what begins in line 2."),
    "twice": (HEAD + "seed: 1\ntokens: {}\nseed: 2\n", "line 4: the key seed is there twice, first in line 2"),
    "twice_within": (HEAD + "tokens:\n  context_size: 1\n  context_size: 2\n", "line 4: the key .* in line 3"),
    "object": (HEAD + "experiment_name: !!python/object/apply:os.system [touch pwned]\n", "line 2: the tag !!python/"),
    "own_tag": (HEAD + "seed: !seed 3\n", "line 2: the tag !seed"),
    "number_as_key": (HEAD + "sweep: {1: [2]}\n", "line 2: a key must be a text"),
    "list": ("- a\n- b\n", "line 1: the file is a list; it must be a mapping"),
    "list_with_head": (HEAD + "- a\n", "line 1: the file is a list"),
    "text": ("topk\n", "line 1: the file is a str"),
    "number": (HEAD + "3\n", "line 1: the file is a int"),
    "two_documents": (HEAD + "seed: 1\n---\nseed: 2\n", "line 3: but found another document"),
    "no_such_alias": (HEAD + "seed: *x\n", "line 2: found undefined alias"),
    "alias_in_itself": (HEAD + "sweep: &x [*x]\n", "line 2: an alias within what it stands for"),
    "laughs": (HEAD + "a0: &a0 [1]\n" + LAUGHS, "more than 1,000,000 values"),
    "nul": (HEAD + "seed: 1\nfigures: a\0b\n", "line 3: control characters are not allowed"),
    "deep": (HEAD + "sweep: " + "[" * 5000 + "]" * 5000 + "\n", "nested too deeply"),
    "empty": ("", "is empty: an experiment says what it changes"),
    "only_a_head": (HEAD, "is empty"),
    "no_head": ("experiment_name: x\n", r"make its first line `# @package _global_`"),
    "half_a_head": ("# @package\nexperiment_name: x\n", r"make its first line `# @package _global_`"),
    "of_itself": (HEAD + "defaults: [of_itself]\n", "its defaults lead back to it .config → of_itself → of_itself."),
    "builds_on_empty": (HEAD + "defaults: [empty]\nseed: 1\n", "empty.yaml is empty"),
    "defaults_no_list": (HEAD + "defaults: topk\n", "'experiment/defaults_no_list', defaults must be a list"),
}  # fmt: skip


@pytest.fixture(scope="module")
def conf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    conf = tmp_path_factory.mktemp("files") / "conf"
    shutil.copytree(ROOT / "conf", conf)
    for name, (text, _) in WRONG.items():
        (conf / f"experiment/{name}.yaml").write_text(text)
    (conf / "experiment/latin.yaml").write_bytes(HEAD.encode() + b"experiment_name: caf\xe9\n")
    return conf


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_file_is_refused_in_one_sentence(
    conf: Path, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=WRONG[name][1]) as refused:
        compose(conf, [f"experiment={name}"])
    assert "experiment/" in str(refused.value) and "\n" not in str(refused.value)
    assert not (tmp_path / "pwned").exists()


def test_a_file_that_is_not_utf8_is_named_with_its_line(conf: Path) -> None:
    with pytest.raises(ConfigError, match=r"experiment/latin.yaml, line 2: .* save it as UTF-8"):
        compose(conf, ["experiment=latin"])


def test_wrong_files_that_a_run_does_not_read_do_not_stop_it(conf: Path) -> None:
    shutil.copytree(ROOT / "resources", conf.parent / "resources", dirs_exist_ok=True)
    (conf / "dictionary/mine.yaml").write_text("k: [\n")
    assert compose(conf, ["experiment=demo"]).stages["train"]
    with pytest.raises(ConfigError, match="is an option of"):  # for which all choices of the group are looked through
        compose(conf, ["dictionary=relu", "dictionary.k=4"])
    with pytest.raises(ConfigError, match=r"dictionary/mine.yaml, line 2"):
        compose(conf, ["dictionary=mine"])


def test_every_file_of_ours_can_be_read() -> None:
    files = sorted((ROOT / "conf").rglob("*.yaml"))
    assert len(files) > 40 and all(isinstance(read(file), dict) for file in files)


def test_aliases_and_merges_are_allowed(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("a: &x {k: 1}\nb: {<<: *x, l: 2}\nc: [*x, *x]\n")
    assert read(tmp_path / "a.yaml")["b"] == {"k": 1, "l": 2}


@pytest.mark.parametrize("how", ["snakemake", "plan"])
def test_the_workflow_and_the_plan_say_it_without_a_traceback(conf: Path, how: str, tmp_path: Path) -> None:
    command = {
        "snakemake": ["-m", "snakemake", "-s", ROOT / "Snakefile", "-d", tmp_path, "-n", "--config", f"conf={conf}",
                      "hydra=experiment=tab"],
        "plan": [ROOT / "scripts/plan.py", "--conf", conf, "experiment=tab"],
    }[how]  # fmt: skip
    done = subprocess.run([sys.executable, *command], cwd=tmp_path, capture_output=True, text=True)
    told = done.stdout + done.stderr
    assert done.returncode and "experiment/tab.yaml, line 3: a tab" in told and "Traceback" not in told
