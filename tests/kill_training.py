"""Kills a training job with SIGKILL at many moments, each in a forked child, and runs it again: see test_resume.

    python kill_training.py FOLDER STORE

FOLDER gets results for every kill, completed by further runs, and `undisturbed`, made in one; STORE holds activations.
"""

import json
import os
import shutil
import signal
import sys
from pathlib import Path

import torch
from kill_caching import die_at
from stores import TRAINING_STORE, training_plan

from saeflow.jobs import job as artifacts
from saeflow.jobs.job import Job
from saeflow.training import checkpoints
from saeflow.training.checkpoints import Checkpoints
from saeflow.training.loop import train
from saeflow.training.trainer import Trainer

HOOKS = ["blocks.0.ln2.hook_normalized", "blocks.0.hook_mlp_out"]
TRANSCODER = {"kind": "transcoder", "activation": "relu", "l1_coefficient": 0.1, "expansion": 3}
DICTIONARIES = {
    "relu-1": TRANSCODER,
    "batchtopk-2": {"kind": "transcoder", "activation": "batchtopk", "k": 3, "expansion": 3, "skip": True},
    "topk-3": {"kind": "transcoder", "activation": "topk", "k": 2, "expansion": 3, "sparsity": "unit_norm"},
}
TRAININGS = {
    "auxk": {"revive": "auxk", "dead_after_tokens": 300},
    "resample": {
        "revive": "resample", "resample_steps": [9, 20], "resample_batches": 2, "dead_after_tokens": 300,
        "resample_warm_up_steps": 5,
    },
}  # fmt: skip
STEPS = [
    (Trainer, "train_step", 2),
    (Trainer, "train_step", 30),
    (Trainer, "train_step", 61),
    (Trainer, "train_step", 90),
]
STEPS += [(Checkpoints, "save", 1), (Checkpoints, "save", 25), (Checkpoints, "remove", 2), (Path, "replace", 20)]
STEPS += [(artifacts, "provenance", 2)]


def main(folder: Path, store: Path) -> None:
    torch.set_num_threads(1)  # a fork would not survive a pool of threads
    checkpoints.SHARE = float("inf")  # a checkpoint after every step, whatever it costs

    def run(results: Path, options: dict) -> None:
        training = {"n_tokens": 3840, "batch_size": 128, "lr": 1e-2, "log_every": 7, "l1_warm_up_steps": 10} | options
        plan = training_plan(results, HOOKS, DICTIONARIES, training, json.dumps({"checkpoint_seconds": 0.0}))
        train([Job(instance, plan, "cpu") for instance in plan.stages["train"].values()])

    def in_a_child(results: Path, options: dict, *death: object) -> int:
        child = os.fork()
        if child == 0:
            die_at(*death)
            run(results, options)
            os._exit(0)
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

    for name, options in TRAININGS.items():
        for i, (owner, function, count) in enumerate([*STEPS, (None, "", 0)]):
            results = folder / name / (f"{i}" if owner else "undisturbed")
            (results / "activations").mkdir(parents=True)
            (results / "activations" / TRAINING_STORE).symlink_to(store)
            if owner:
                for after in (False, True):  # the second kill hits a job that went on from a checkpoint
                    status = in_a_child(results, options, owner, function, count // (1 + after) or 1, after)
                    assert status == -signal.SIGKILL or after, (
                        f"{owner.__name__}.{function} was not called {count} times"
                    )
            run(results, options)
            assert not (results / "checkpoints").exists() or not any((results / "checkpoints").iterdir())
            shutil.rmtree(results / "activations")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
