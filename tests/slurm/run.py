"""The workflow through a real Slurm of two nodes: first undisturbed, then with a fault a run; the bytes have to be
those of a run without Slurm. As root, on Debian or Ubuntu; `make test-slurm`.

A line a fault; the last line is one JSON object of flat keys: `tried`, `survived`, by kind what happened (jobs that
Slurm was given, seconds, the step that the training went on from), and `slurm_overhead_per_job_s`.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cluster import Folder, Run, daemons, ended, jobs, last_job, overhead, shared, slurm, until

SMALL = "experiment=slurm"
ONE = (
    "experiment=slurm sweep={dictionary:topk,site:mlp_out,dictionary.k:4} dictionary.expansion=16 blind=null "
    "training.n_tokens=1_024_000 figures=[training_curves]"
)
"""A training of about half a minute, its evaluation and its figures."""


class Fault:
    """A copy of a folder in which all is there that the training reads, the training at work through Slurm."""

    def __init__(self, folder: Folder, work: Path, *options: str, hydra: str = "", steps: int = 100) -> None:
        self.folder, self.work, self.options, self.hydra = folder, work, options, hydra
        self.first = last_job()
        self.process = self.submit()
        until(lambda: self.folder.steps() > steps or self.process.poll() is not None, what="a checkpoint")
        self.number = next(iter(jobs("train")), "")

    def submit(self) -> subprocess.Popen:
        return self.folder.submit(*self.options, hydra=self.hydra)

    @property
    def node(self) -> str:
        return slurm("squeue", "--noheader", "--states=all", f"--jobs={self.number}", "--format=%N").strip()

    def queued_again(self) -> None:
        """Waits until Slurm has the training in its queue again, and spares the two minutes that it waits there."""
        pending = ("squeue", "--noheader", "--states=PENDING", "--format=%A", f"--jobs={self.number}")
        until(lambda: bool(slurm(*pending).strip()), what="a job in the queue again")
        slurm("scontrol", "update", f"jobid={self.number}", "starttime=now")

    def end(self) -> Run:
        return self.folder.end(self.process)


# ---------------------------------------------------------------- the faults
def cancelled(fault: Fault) -> None:
    """Somebody cancels the job, with TERM, and with KILL some seconds later; Snakemake submits it again."""
    slurm("scancel", fault.number)


def killed(fault: Fault) -> None:
    """The job gets KILL at once."""
    slurm("scancel", "--signal=KILL", fault.number)


def preempted(fault: Fault) -> None:
    """A job of a partition of higher priority needs the node: TERM, 20 s of grace, and Slurm queues it again."""
    slurm("sbatch", "--partition=urgent", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=sleep 8")
    fault.queued_again()


def node_down(fault: Fault) -> None:
    """An administrator sets the node down, and up again later."""
    name = fault.node
    slurm("scontrol", "update", f"nodename={name}", "state=down", "reason=test")
    fault.queued_again()
    time.sleep(10)
    slurm("scontrol", "update", f"nodename={name}", "state=resume")


def node_lost(fault: Fault) -> None:
    """The power of the node fails; Slurm notices, and gives the job to the other. The node comes back later."""
    name = fault.node
    daemons("kill", name)
    fault.queued_again()
    time.sleep(5)
    daemons("node", name, *shared(fault.work))


def controller_restarted(fault: Fault) -> None:
    """slurmctld is killed, and started again ten seconds later."""
    os.kill(int(Path("/var/tmp/saeflow-slurm/run/slurmctld.pid").read_text()), signal.SIGKILL)
    time.sleep(10)
    daemons("controller")
    until(lambda: bool(ended()), what="the controller")


def submitter_killed(fault: Fault) -> None:
    """Snakemake is killed; its job works on, and so does who types the command again: neither does the other's work."""
    os.killpg(fault.process.pid, signal.SIGKILL)
    fault.process.wait()
    fault.process = fault.submit()


def submitter_interrupted(fault: Fault) -> None:
    """Control-C cancels the job; the command is typed again."""
    os.killpg(fault.process.pid, signal.SIGINT)
    fault.process.wait()
    until(lambda: not jobs("train"), what="the end of cancelled jobs")
    fault.process = fault.submit()


def nothing(fault: Fault) -> None:
    """What is wrong is in the options."""


def others_plan(fault: Fault) -> None:
    """Snakemake is killed while its job works; another experiment is run from the same folder."""
    os.killpg(fault.process.pid, signal.SIGKILL)
    fault.process.wait()
    other = fault.folder.end(fault.folder.submit(hydra="dictionary.k=5 training.n_tokens=20_480 experiment_name=other"))
    if other.code:
        raise RuntimeError(f"the other experiment failed:\n{other.said}")
    fault.process = fault.submit()


FAULTS: dict[str, tuple[Callable[[Fault], None], dict[str, Any]]] = {
    "cancelled": (cancelled, {}),
    "killed": (killed, {}),
    "preempted": (preempted, {"requeued": True}),
    "node_down": (node_down, {"requeued": True}),
    "node_lost": (node_lost, {"requeued": True}),
    "controller_restarted": (controller_restarted, {}),
    "submitter_killed": (submitter_killed, {}),
    "submitter_interrupted": (submitter_interrupted, {}),
    "others_plan": (others_plan, {}),
    # A cgroup kills what takes more than it asked for: the second or third try has enough.
    "memory_too_small": (nothing, {"hydra": "device.mem_mb.train=300", "steps": -2}),
    # One minute, of which a training gets 30 s until TERM; two at the second try, three at the third.
    "time_too_short": (
        nothing,
        {
            "options": ("--default-resources", "slurm_extra='--signal=TERM@30'", "mem_mb=4000"),
            "hydra": "device.runtime.train=1",
            "n_tokens": 4_096_000,
            "steps": -2,
        },
    ),
}


# ---------------------------------------------------------------- the runs
def undisturbed(work: Path) -> dict[str, Any]:
    """The whole small experiment here and through Slurm, where three jobs share the caching: the same bytes?"""
    shutil.rmtree(work / "there", ignore_errors=True)
    here, there = Folder(work / "here", SMALL), Folder(work / "there", SMALL)
    local = here.here()
    require(local, "the run without Slurm")
    before = last_job()
    remote = there.end(there.submit(hydra="device.parts.activations=3"))
    require(remote, "the run through Slurm")
    n_jobs, wrong = len(ended(before)), differences(there, here)
    say("undisturbed", not wrong, f"{n_jobs} jobs, {remote.seconds:.0f} s (here {local.seconds:.0f} s) {wrong}")
    return {"undisturbed_same": not wrong, "undisturbed_jobs": n_jobs, "undisturbed_s": round(remote.seconds)}


def disturbed(name: str, base: Folder, expected: dict[int, Folder], work: Path) -> tuple[bool, dict[str, Any]]:
    strike, how = FAULTS[name]
    how = {"n_tokens": 0, "options": (), "hydra": "", "steps": 100, "requeued": False} | how
    shutil.rmtree(work / name, ignore_errors=True)
    folder = base.copy(work / name)
    if how["n_tokens"]:
        how["hydra"] += f" training.n_tokens={how['n_tokens']}"
    fault = Fault(folder, work, *how["options"], hydra=how["hydra"], steps=how["steps"])
    began = time.monotonic()
    try:
        strike(fault)
    except (TimeoutError, ValueError, RuntimeError, subprocess.CalledProcessError) as error:
        say(name, False, f"the fault could not be injected: {error}")
    run = fault.end()
    wrong = ["it ended with an error"] if run.code else differences(folder, expected[how["n_tokens"]], part=True)
    states = ended(fault.first)
    if how["requeued"] and len(states) != 2 and not wrong:
        wrong = ["it cost a retry"]
    took, step = time.monotonic() - began, folder.went_on()
    told = ", ".join(f"{number} {state.lower()}" for number, state in sorted(states.items()))
    say(name, not wrong, f"Slurm's jobs {told}; went on from step {step}; {took:.0f} s {wrong}")
    if wrong:
        print("\n".join(run.said.splitlines()[-15:]), file=sys.stderr)
    else:
        shutil.rmtree(folder.home)
    return not wrong, {f"{name}_jobs": len(states), f"{name}_went_on_from": step, f"{name}_s": round(took)}


def differences(folder: Folder, expected: Folder, part: bool = False) -> list[str]:
    """Files that are not byte for byte the same, or are there in one alone; `part`: it may have more."""
    one, other = folder.contents(), expected.contents()
    names = other.keys() if part else one.keys() | other.keys()
    return sorted(name for name in names if one.get(name) != other.get(name))[:5]


def require(run: Run, what: str) -> None:
    if run.code:
        sys.exit(f"{what} failed:\n{run.said}")


def say(name: str, well: bool, what: str) -> None:
    print(f"{name:22} {'survived' if well else 'LOST    '} {what}", flush=True)


def prepared(work: Path) -> tuple[Folder, dict[int, Folder]]:
    """A folder that has all that the training reads, and that folder after a training here, by its number of tokens."""
    base = Folder(work / "base", ONE)
    require(base.here("--until", "baseline"), "what the training reads")
    expected = {}
    for n_tokens in {how.get("n_tokens", 0) for _, how in FAULTS.values()}:
        home = work / f"expected-{n_tokens}"
        expected[n_tokens] = Folder(home, ONE) if home.exists() else base.copy(home)
        require(expected[n_tokens].here(hydra=f"training.n_tokens={n_tokens}" if n_tokens else ""), "the training")
    return base, expected


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--work", type=Path, default=Path("/var/tmp/saeflow-slurm-work"), help="folder, emptied first (see --keep)"
    )
    parser.add_argument("--faults", nargs="*", default=list(FAULTS), choices=FAULTS, help="all, if none is named")
    parser.add_argument("--only-faults", action="store_true", help="leave out the whole experiment, undisturbed")
    parser.add_argument("--keep", action="store_true", help="keep what an earlier call made there without Slurm")
    args = parser.parse_args()
    if not args.keep:
        shutil.rmtree(args.work, ignore_errors=True)
    args.work.mkdir(parents=True, exist_ok=True)
    found: dict[str, Any] = {}
    survived = []
    try:
        daemons("up", *shared(args.work))
        if not args.only_faults:
            found = undisturbed(args.work)
            found["slurm_overhead_per_job_s"] = round(overhead(args.work), 1)
            print(f"{'overhead':22} {found['slurm_overhead_per_job_s']} s a job", flush=True)
        base, expected = prepared(args.work) if args.faults else (None, {})
        for name in args.faults:
            well, about = disturbed(name, base, expected, args.work)
            survived.append(well)
            found |= about
    finally:
        daemons("down")
    print(json.dumps({"tried": len(survived), "survived": sum(survived)} | found))
    sys.exit(not (all(survived) and found.get("undisturbed_same", True)))


main()
