"""Dry runs of the workflow within one process: what Snakemake would run, without starting it anew each time."""

import contextlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from snakemake.api import DAGApi, SnakemakeApi
from snakemake.settings.enums import Quietness, RerunTrigger
from snakemake.settings.types import ConfigSettings, DAGSettings, OutputSettings, ResourceSettings

from saeflow.planning.graph import Plan
from saeflow.storage.receipts import RECEIPT

ROOT = Path(__file__).resolve().parent.parent


@contextlib.contextmanager
def opened(home: Path, hydra: str, **settings: Iterable[str] | bool) -> Iterator[DAGApi]:
    """Snakemake's commands, once it has read the rules in `home`; `settings` are those of its DAG."""
    config = {"hydra": hydra, "conf": str(home / "conf")}
    before = os.environ.get("SAEFLOW_PLAN")
    dag: dict[str, Any] = {
        name: value if isinstance(value, bool) else frozenset(value) for name, value in settings.items()
    }
    with contextlib.ExitStack() as stack:
        stack.callback(
            lambda: os.environ.pop("SAEFLOW_PLAN", "") if before is None else os.environ.update(SAEFLOW_PLAN=before)
        )
        api = stack.enter_context(SnakemakeApi(OutputSettings(quiet={Quietness.ALL})))
        workflow = api.workflow(
            resource_settings=ResourceSettings(cores=1),
            config_settings=ConfigSettings(config=config, config_args=[f"{k}={v}" for k, v in config.items()]),
            snakefile=ROOT / "Snakefile",
            workdir=home,
        )
        yield workflow.dag(DAGSettings(rerun_triggers=frozenset({RerunTrigger.MTIME}), **dag))


def dry_run(home: Path, hydra: str, **settings: Iterable[str] | bool) -> dict[str, list[str]]:
    """Keys of each stage that a run in `home` would make, as the rules' own plan says what each job makes."""
    with opened(home, hydra, **settings) as dag:
        files: list[str] = []
        dag.execute_workflow(executor="dryrun", updated_files=files)
        plan: Plan = dag.workflow_api._workflow.globals["PLAN"]
        made: dict[str, list[str]] = {}
        for receipt in (Path(file) for file in files if Path(file).name == RECEIPT):
            stage, *key = receipt.parent.relative_to(plan.results).parts
            made.setdefault(stage, []).extend(plan.members(stage, "/".join(key)))
    return {stage: sorted(keys) for stage, keys in made.items()}
