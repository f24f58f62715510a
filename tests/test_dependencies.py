"""pyproject.toml, requirements.lock, environment.yml and the imports say the same."""

import ast
import importlib.metadata
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterable
from pathlib import Path

import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
LOCK_LINES = [s for s in (ROOT / "requirements.lock").read_text().splitlines() if s and not s.startswith("#")]
LOCK = {canonicalize_name(s.split("==")[0]): s.split("==")[1] for s in LOCK_LINES if "==" in s}
NOT_LOCKED = {"tensorboard"}  # extras that `make env` does not install


def requirements(extras: Iterable[str] = ()) -> dict[str, Requirement]:
    """What pyproject.toml asks for, with these extras, by canonical name."""
    lines = [*PROJECT["dependencies"], *(r for e in extras for r in PROJECT["optional-dependencies"][e])]
    return {canonicalize_name(r.name): r for r in map(Requirement, lines)}


EVERYTHING = requirements(PROJECT["optional-dependencies"])
LOCKED = requirements(e for e in PROJECT["optional-dependencies"] if e not in NOT_LOCKED)


def imported(*folders: str) -> dict[str, str]:
    """Top-level names of the third-party modules imported by the Python and Snakemake files below the folders, and a
    file that does so."""
    found: dict[str, str] = {}
    paths = sorted(p for folder in folders for p in (ROOT / folder).rglob("*.*") if p.suffix in (".py", ".smk"))
    for path in paths:
        for name in _imports(path):
            found.setdefault(name, str(path.relative_to(ROOT)))
    own = {"saeflow", "snakemake_logger_plugin_saeflow", *folders, *sys.stdlib_module_names, *(p.stem for p in paths)}
    return {name: path for name, path in found.items() if name not in own}


def _imports(path: Path) -> set[str]:
    """Top-level names of all imports, wherever they stand in the file."""
    if path.suffix == ".smk":
        return set(re.findall(r"^ *(?:from|import) (\w+)", path.read_text(), re.MULTILINE))
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names.add(node.module.split(".")[0])
    return names


def packages(modules: Iterable[str]) -> dict[str, set[str]]:
    """The installed packages that bring each module; a module that is not installed counts as its own package."""
    brought_by = importlib.metadata.packages_distributions()
    return {m: {canonicalize_name(d) for d in brought_by.get(m, [m])} for m in modules}


def undeclared(modules: dict[str, str], declared: Iterable[str]) -> dict[str, str]:
    """Those modules that none of the declared packages brings."""
    return {m: modules[m] for m, names in packages(modules).items() if not names & set(declared)}


def test_lock_is_one_exact_version_a_line_without_hashes() -> None:
    odd = [line for line in LOCK_LINES if not re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][A-Za-z0-9.]*", line)]
    assert not odd
    assert len(LOCK) == len(LOCK_LINES)
    assert LOCK["torch"] == "2.13.0"


def test_lock_holds_what_pyproject_asks_for() -> None:
    assert {n: str(r) for n, r in LOCKED.items() if n not in LOCK or not r.specifier.contains(LOCK[n], True)} == {}


def test_torch_is_exact_in_pyproject() -> None:
    assert str(EVERYTHING["torch"].specifier) == "==2.13.0"


def test_lock_is_closed_and_has_no_leftovers() -> None:
    """Every need of a locked package is locked in a version that it accepts, and each is a need of this project."""
    reached, wrong = set(), []
    todo = [(name, extra) for name, r in LOCKED.items() for extra in ("", *r.extras)]
    while todo:
        name, extra = todo.pop()
        if (name, extra) in reached:
            continue
        reached.add((name, extra))
        for need in map(Requirement, importlib.metadata.requires(name) or []):
            if need.marker is not None and not need.marker.evaluate({"extra": extra}):
                continue
            needed = canonicalize_name(need.name)
            if needed in LOCK and need.specifier.contains(LOCK[needed], prereleases=True):
                todo += [(needed, e) for e in ("", *need.extras)]
            elif name != "torch":  # its builds for accelerators need packages of their own
                wrong.append(f"{name} needs {need}, the lock has {LOCK.get(needed)}")
    assert not wrong
    assert sorted(set(LOCK) - {name for name, _ in reached}) == []


def test_conda_route_installs_the_same_lock_on_a_legal_python() -> None:
    wanted = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    (pip,) = [entry["pip"] for entry in wanted if isinstance(entry, dict)]
    assert pip == ["-r requirements.lock", "-e ."]
    (python,) = [entry.split("=")[1] for entry in wanted if isinstance(entry, str) and entry.startswith("python=")]
    assert SpecifierSet(PROJECT["requires-python"]).contains(python)
    assert [entry for entry in wanted if isinstance(entry, str)] == [f"python={python}", "pip"]


def test_library_and_scripts_import_only_declared_packages() -> None:
    declared = requirements(e for e in PROJECT["optional-dependencies"] if e != "dev")
    brought_by_torch = {"triton"}  # where it has CUDA; nowhere else is it imported
    assert undeclared(imported("src", "scripts", "workflow"), declared).keys() <= brought_by_torch


def test_tests_benchmarks_and_documentation_import_only_declared_packages() -> None:
    peers = re.findall(r'"([a-z-]+)==[0-9.]+"', (ROOT / "benchmarks/_peers.py").read_text())  # it installs those itself
    names = {name.removeprefix("eai-").replace("-", "_") for name in peers}
    assert undeclared(imported("tests", "benchmarks", "docs"), EVERYTHING).keys() <= names


def test_every_declared_package_is_imported_somewhere() -> None:
    used = packages(imported("src", "scripts", "tests", "benchmarks", "workflow"))
    assert sorted(set(requirements()) - set().union(*used.values())) == []


def test_make_takes_the_variables_that_its_documents_name() -> None:
    """What make does not know it takes for an override that fell outside of the quotes, and refuses."""
    texts = [
        ROOT / "Makefile",
        ROOT / "README.md",
        *ROOT.glob("docs/*.md"),
        *ROOT.glob("src/**/*.py"),
        *ROOT.glob("scripts/*.py"),
    ]
    named = {name for text in texts for name in re.findall(r"\bmake [a-z-]+ ([A-Z_]+)=", text.read_text())}
    assert {"HYDRA", "NAME", "FAULTS", "SET_ASIDE"} <= named
    command = ["make", "-n", "help", "OTHER=1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode and "OTHER is no variable here" in done.stderr
    done = subprocess.run(
        [*command[:-1], *(f"{name}=1" for name in sorted(named))], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
