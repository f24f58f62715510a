# What Snakemake's commands do here. A job makes several artifacts, of which Snakemake knows one file, and the plan, not
# times, decides what runs: so these methods of the workflow, which Snakemake calls when it has read the rules, ask the plan.
from snakemake.executors.touch import Executor as Touch
from snakemake.jobs import Job as Scheduled
from snakemake.logging import logger

from saeflow.jobs.signals import MOST_STOPS, was_stopped
from saeflow.planning.frozen import touch
from saeflow.planning.keeping import last_run
from saeflow.planning.removal import remove
from saeflow.planning.summary import summary
from saeflow.results.front import write_front_page


def execute(executor_plugin, **settings):
    """A run, or a dry one."""
    if issubclass(executor_plugin.executor, Touch):
        raise WorkflowError("run without --touch: times make nothing stale here, and what is missing has to be made")
    try:
        check_folders(PLAN)
        check_disk(PLAN)
        check_remote(PLAN)
    except ConfigError as error:
        raise WorkflowError(str(error))
    dry = executor_plugin.common_settings.dryrun_exec
    if workflow.execution_settings.no_hooks and not dry:
        freeze_run(PLAN)  # which is a hook of ours
    remove_torn_records()
    try:
        type(workflow).execute(workflow, executor_plugin=executor_plugin, **settings)
    except OSError as error:
        raise WorkflowError(
            f"{error.filename or 'a folder of this run (logs/, .snakemake/, results/)'} cannot be used: {error.strerror}; "
            "once it can be written, the same command goes on from here"
        )
    finally:
        if not dry:
            front_page()


def front_page():
    """Writes results/index.html, also after a run that failed or had nothing to do, which is noted as the last that
    asked for these artifacts. That it cannot be written is no failure of a run."""
    try:
        last = last_run(PLAN)
        touch(last[0]) if last else freeze_run(PLAN)
        write_front_page(PLAN.results, config.get("conf"))
    except (OSError, ValueError, LookupError) as error:
        logger.warning(f"{PLAN.results}/index.html could not be written: {error}")


def delete_output(only_temp=False, dryrun=False):
    """Whole artifacts, and all of them."""
    if only_temp:
        return  # there is no such output
    settings = workflow.dag_settings
    if settings.targets or settings.until or settings.omit_from:
        raise WorkflowError("--delete-all-output removes all of an experiment: for less, remove folders below results/")
    try:
        for path in remove(PLAN, dry=dryrun):
            logger.info(f"{'Would delete' if dryrun else 'Deleting'} {path}")
    except ConfigError as error:
        raise WorkflowError(str(error))


def list_changes(change_type):
    logger.info("none: what an artifact is made of is in its key, so none is out of date; `make plan` says what is new")


def list_untracked():
    raise WorkflowError(
        "--list-untracked takes files of finished artifacts for left over: use `python scripts/plan.py --keys`"
    )


def restart_times(job):
    """How often a job that has ended badly may be run again. To be asked to stop is no failure, of which `retries` are:
    whoever preempts a node, under any executor, costs none of them."""
    stopped = job.attempt <= MOST_STOPS and any(map(was_stopped, job.log))
    return max(job.rule.restart_times, job.attempt if stopped else 0)


if workflow.is_main_process:
    Scheduled.restart_times = property(restart_times)
    workflow.execute = execute
    workflow.delete_output = delete_output
    workflow.list_changes = list_changes
    workflow.list_untracked = list_untracked
    workflow.summary = lambda detailed=False: print(summary(PLAN, forced_stages(), detailed))
