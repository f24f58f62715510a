"""Evaluations of a composed plan that were never run: summaries, draws and histograms as the jobs would write them."""

import json
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from stores import write_receipt

from saeflow.dictionaries.spec import amount_of
from saeflow.evaluation.comparisons import PAIRED
from saeflow.jobs.job import Job
from saeflow.planning.graph import Instance, Plan

RATIOS = ("loss_recovered_zero", "loss_recovered_mean", "explained_variance", "fvu", "cosine", "kl")
MODEL = {"clean": 3.5, "mean": 4.2, "zero": 4.5}


def write_evaluations(plan: Plan, values: Callable[[dict[str, Any]], dict[str, float]], n_draws: int = 30) -> Job:
    """Fills `evaluate` of a plan, and returns its job of figures. `values` gives `l0` and `ce_replaced` (and whatever
    else is to replace the defaults) of a dictionary, by what its summary says it is."""
    for key, instance in plan.stages["evaluate"].items():
        summary = _identity(plan, instance)
        measured = {"ce_clean": MODEL["clean"], "ce_zero": MODEL["zero"], "ce_mean": MODEL["mean"]}
        measured |= dict.fromkeys(RATIOS, 0.5) | {"dead_fraction": 0.0} | values(summary)
        measured["ce_increase"] = measured["ce_replaced"] - measured["ce_clean"]
        measured |= {f"{name}_without_bos": value for name, value in measured.items()}
        ends = {f"{n}_{end}": v + shift for n, v in measured.items() for end, shift in (("low", -0.01), ("high", 0.01))}
        folder = Path(plan.folder("evaluate", key))
        folder.mkdir(parents=True, exist_ok=True)
        summary |= measured | ends | {"confidence": instance.config["evaluation"]["confidence"], "n_documents": 20}
        (folder / "summary.json").write_text(json.dumps(summary))
        # draws are of the documents, so alike for all dictionaries on the same tokens, and for no others
        noise = np.random.default_rng(zlib.crc32(summary["tokens_key"].encode())).normal(scale=0.005, size=n_draws)
        names = [*PAIRED, "ce_increase", "ce_increase_without_bos"]
        drawn = {n: measured[n] + (noise if n.startswith("ce") else 0.0) for n in names}
        pd.DataFrame(drawn, index=range(n_draws)).to_parquet(folder / "resamples.parquet", index=False)
        counts = {"l0": range(5), "tokens": [9, 20, 30, 20, 1], "tokens_without_bos": [0, 20, 30, 20, 1]}
        pd.DataFrame(counts).to_parquet(folder / "l0.parquet", index=False)
        write_receipt(folder, "evaluate")
    (figures,) = plan.stages["figures"].values()
    return Job(figures, plan, "cpu")


def _identity(plan: Plan, instance: Instance) -> dict[str, Any]:
    (stage,) = {"train", "foreign"} & instance.needs.keys()
    (made,) = instance.needs[stage]
    config, part = plan.instance(stage, made).config, instance.config.get("part")
    dictionary = config["dictionary"] if stage == "train" else {"kind": "sae", "activation": "relu"}
    hook, out = config["hook_name"], config.get("hook_name_out") or config["hook_name"]
    kind = "sae" if dictionary["kind"] in ("sae", "jacobian") else dictionary["kind"]
    if dictionary["kind"] == "jacobian":
        hook = out = {"input": hook, "output": out}[part]
    name, amount = amount_of(dictionary.get("k"), dictionary.get("l1_coefficient"), dictionary.get("options", {}))
    head = int(part[-1]) if str(part).startswith("head_") else config.get("head")
    return {
        "train_key": made, "part": part, "dictionary_key": "/".join(p for p in (made, part) if p),
        "tokens_key": instance.needs["tokens"][0], "model_name": "embedded",
        "source": "" if stage == "train" else "dictionary_learning",
        "jacobian_coefficient": dictionary.get("jacobian_coefficient"), "amount_name": name, "amount": amount,
        "kind": "sae" if head is not None else kind, "activation": dictionary["activation"],
        "skip": dictionary.get("skip", False), "saelens": dictionary.get("saelens"),
        "k": dictionary.get("k"), "l1_coefficient": dictionary.get("l1_coefficient"),
        "hook_name": hook, "hook_name_out": out, "hook_head_index": head,
        "d_sae": dictionary.get("d_sae") or 128 * dictionary.get("expansion", 1),
        "sparsity": dictionary.get("sparsity"), "seed": config.get("seed"),
    }  # fmt: skip
