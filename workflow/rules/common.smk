import os
import shlex
import sys
from functools import partial

from snakemake.exceptions import WorkflowError

from saeflow.config import ConfigError
from saeflow.figures.whereabouts import whereabouts
from saeflow.planning.batches import assign_batches, resources
from saeflow.planning.digests import DIGESTS_FILE, short_hash
from saeflow.planning.expansion import compose
from saeflow.planning.explain import check_disk
from saeflow.planning.graph import Plan
from saeflow.planning.overrides import of_snakemake
from saeflow.planning.stages import stages

PLAN_FILE = ".snakemake/plan.json"
RUN = f"{shlex.quote(sys.executable)} {shlex.quote(workflow.basedir)}/scripts"

# The scheduling process composes conf/; a job of a running workflow (on a cluster, where each job parses this file
# again) loads what was frozen at its start, so that an edit of conf/ meanwhile can neither change nor lose it.
if workflow.is_main_process:
    try:
        OVERRIDES = of_snakemake(config, workflow.config_settings.config_args)
        PLAN = compose(config.get("conf", f"{workflow.basedir}/conf"), OVERRIDES, digests=DIGESTS_FILE)
        PLAN.set_aside_broken()
        assign_batches(PLAN, Plan.load_if_valid(PLAN_FILE))
        check_disk(PLAN)
    except (ConfigError, ValueError, OSError) as error:
        raise WorkflowError(str(error))
    for handler in workflow.logger_manager.get_log_handlers():
        handler.ending = partial(whereabouts, PLAN, OVERRIDES)  # of those of our logger, the last words of a run
        handler.there = sum(PLAN.done(name, key) for name, table in PLAN.stages.items() for key in table)
else:
    PLAN = Plan.load(PLAN_FILE)


onstart:
    PLAN.freeze(PLAN_FILE)


wildcard_constraints:
    key="[^/]+",


def key_options(keys):
    """Options of scripts/job.py that name the artifacts to make."""
    return " ".join(f"--key {shlex.quote(key)}" for key in keys)


def of_key(find):
    """`find` of the artifact that a job makes, as a function of its wildcards."""
    return lambda wildcards: find(wildcards.key)


def resources_of_key(stage):
    """What `resources` says of the artifact that a job makes; device and GPU are those of all of a stage."""
    units = resources(PLAN, stage, list(PLAN.stages[stage])[:1]).keys()
    return {unit: of_key(lambda key, unit=unit: resources(PLAN, stage, [key]).get(unit)) for unit in units}


# Command line of every stage's jobs. Shell lines are put together when a job starts, when loops over stages have long
# ended: so the stage is a resource, which, unlike a parameter, is never a reason to rerun.
JOB = (
    f"{RUN}/job.py {{resources.stage}} --plan {PLAN_FILE} {{params.select}}"
    " --device {resources.device} --threads {threads} --log {log:q} --quiet"
)
