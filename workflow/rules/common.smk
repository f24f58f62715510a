import os
import shlex
import sys
from functools import cache, partial
from pathlib import Path

from snakemake.exceptions import WorkflowError
from snakemake.logging import logger

from saeflow.config import ConfigError
from saeflow.figures.whereabouts import whereabouts
from saeflow.jobs.signals import pass_on_term
from saeflow.planning.batches import resources, set_aside_broken
from saeflow.planning.digests import DIGESTS_FILE
from saeflow.planning.expansion import compose
from saeflow.planning.frozen import freeze_run, plan_file, remove_torn_records
from saeflow.planning.graph import Plan
from saeflow.planning.machine import check_disk, check_folders, check_machine, notes
from saeflow.planning.overrides import of_snakemake
from saeflow.planning.parts import Part, mark, part_name
from saeflow.planning.remote import check_remote, notes_of_bucket
from saeflow.planning.stages import downstream, stages

# Every job runs with the interpreter that runs snakemake, which its provenance names. That the rules name environment.yml
# says what they need; it makes none.
if workflow.deployment_settings and workflow.deployment_settings.deployment_method:
    raise WorkflowError(
        "--sdm has no effect here: every job runs in the environment that runs snakemake, on a disk that all nodes see; "
        "leave the option out (docs/cluster.md)"
    )

# The checkout, whichever of its two Snakefiles is run.
BASE = str(Path(os.path.abspath(workflow.current_basedir.get_path_or_uri(secret_free=True))).parents[1])

if set("{}") & set(BASE):
    raise WorkflowError(
        f"{BASE}: Snakemake takes braces in the path of a workflow for its own; move this checkout to a folder without"
    )

# As it stands in shell lines, where braces are Snakemake's.
RUN = f"{shlex.quote(sys.executable)} {shlex.quote(BASE)}/scripts".replace("{", "{{").replace("}", "}}")

# The scheduling process composes conf/; a job of a running workflow (on a cluster, where each job parses this file
# again) loads what was frozen at its start, so that an edit of conf/ or another run can neither change nor lose it.
# Which that is, Snakemake tells every job, wherever it runs, as a variable of the environment.
if workflow.is_main_process:
    try:
        OVERRIDES = of_snakemake(config, workflow.config_settings.config_args)
        PLAN = compose(config.get("conf", f"{BASE}/conf"), OVERRIDES, digests=DIGESTS_FILE)
        set_aside_broken(PLAN)
        if workflow.output_settings.dryrun:
            for note in [*notes(PLAN), *notes_of_bucket(PLAN)]:
                logger.warning(note)
    except (ConfigError, ValueError, OSError) as error:
        raise WorkflowError(str(error))
    for handler in workflow.logger_manager.get_log_handlers():
        handler.ending = partial(whereabouts, PLAN, OVERRIDES)  # of those of our logger, the last words of a run
        handler.there = sum(map(len, PLAN.found.values()))
        handler.together = PLAN.together
    os.environ["SAEFLOW_PLAN"] = str(plan_file(PLAN))
else:
    pass_on_term()
    try:
        PLAN = Plan.load(os.environ["SAEFLOW_PLAN"])
    except KeyError:
        raise WorkflowError("a job has no plan: let the executor pass SAEFLOW_PLAN of the environment on to it")
    except ConfigError as error:
        raise WorkflowError(str(error))


envvars:
    "SAEFLOW_PLAN",


MAKING = {PLAN.receipt(stage, key) for stage, keys in PLAN.to_make.items() for key in keys}


onstart:
    if workflow.local_exec and not workflow.touch:
        try:
            check_machine(PLAN)  # machines that another executor takes may have what this one has not
        except ConfigError as error:
            raise WorkflowError(str(error))
    freeze_run(PLAN)


wildcard_constraints:
    key=".+",  # of a column of activations it has a store in front
    part=r"\d+-of-\d+",


def forced_targets():
    settings = workflow.dag_settings
    return {*settings.forcerun, *(settings.targets if settings.forcetargets else ())}


@cache
def forced_stages():
    """Stages that Snakemake was told to force, and all that follow from them.

    What else runs, the plan has decided.
    """
    named = {part for name in forced_targets() for part in name.split("/")}
    return downstream(stages() if workflow.dag_settings.forceall else named & stages().keys())


def inputs_of(stage, key=None):
    """Receipts that the job of an artifact waits for, as a function of its wildcards. Those that are there are
    `ancient`: their times make nothing stale."""

    def find(wildcards):
        forced = forced_stages()
        follows = tuple(f"{PLAN.results}/{name}/" for name in forced)
        alone = [os.path.normpath(target) for target in forced_targets()]
        receipts = PLAN.inputs(stage, key or wildcards.key, again=stage in forced, alone=alone)
        return [r if r.startswith(follows) or r in MAKING else ancient(r) for r in receipts]

    return find


def marks_of(stage):
    """Marks of the parts that the job of an artifact waits for, as a function of its wildcards."""
    return lambda wildcards: PLAN.marks(stage, wildcards.key)


def resources_of_key(stage):
    """What `resources` says of the job of an artifact, or of a part; device and GPU are those of all of a stage."""

    @cache
    def of_job(key, attempt, parts):
        return resources(PLAN, stage, PLAN.members(stage, key), attempt, parts)

    def find(wildcards, attempt, unit):
        part = wildcards.get("part")
        return of_job(wildcards.key, attempt, Part.parse(part).of if part else 1).get(unit)

    units = resources(PLAN, stage, list(PLAN.stages[stage])[:1]).keys()
    return {unit: partial(find, unit=unit) for unit in units}


# Command line of every stage's jobs. Shell lines are put together when a job starts, when loops over stages have long
# ended: so the stage is a resource, which, unlike a parameter, is never a reason to rerun.
JOB = (
    f"{RUN}/job.py {{resources.stage}} --plan {shlex.quote(os.environ['SAEFLOW_PLAN'])} --job {{wildcards.key:q}}"
    " --device {resources.device} --threads {threads} --log {log:q} --quiet"
)
