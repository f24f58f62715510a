"""Whether the tools that exports are for are installed, and what they say."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
PEERS = ROOT / ".venv-bench"
NAMES = {
    "saedashboard": "sae_dashboard",
    "saedashboard-runs": "sae_dashboard",
    "neuronpedia": "sae_dashboard",
    "delphi": "delphi",
    "circuit-tracer": "circuit_tracer",
}


def ask(tool: str, *arguments: object) -> Any:
    """What `read_by_peers.py` prints, behind everything in .venv. Skips where the tools are not installed."""
    for name in {*NAMES.values()} if tool == "schemas" else {NAMES[tool]}:
        if not (PEERS / name).is_dir():
            pytest.skip(f"{name} is not in {PEERS.name}: make bench NAME=features installs it")
    script = str(Path(__file__).parent / "read_by_peers.py")
    start = "import runpy, sys; sys.path.append(sys.argv.pop(1)); sys.argv.pop(0); "
    command = [sys.executable, "-c", f"{start}runpy.run_path(sys.argv[0], run_name='__main__')", str(PEERS), script]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "WANDB_MODE": "disabled"}
    done = subprocess.run([*command, tool, *map(str, arguments)], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def fits(value: Any, kind: str, schema: dict[str, Any]) -> bool:
    """Whether a JSON value is of a type as the tools' classes name theirs; others of their classes are in `schema`."""
    for optional in ("Optional[", " | None"):
        if optional in kind[:9] or kind.endswith(optional):
            inner = kind.removeprefix("Optional[").removesuffix("]") if "Optional" in optional else kind[:-7]
            return value is None or fits(value, inner, schema)
    if kind.startswith("list["):
        return isinstance(value, list) and all(fits(one, kind[5:-1], schema) for one in value)
    if kind.startswith(("dict[", "tuple[")) or kind == "Any":
        return isinstance(value, dict | list)
    if kind in schema:
        return value.keys() <= schema[kind].keys() and all(fits(value[k], schema[kind][k], schema) for k in value)
    plain = {"int": int, "str": str, "bool": bool, "float": int | float}[kind]
    return isinstance(value, plain) and (kind == "bool" or not isinstance(value, bool))
