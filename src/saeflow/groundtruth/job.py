"""The jobs: a case's rows as tokens, a model of a case as a model folder, dictionaries compared with the truth."""

import json
from functools import cache, partial
from typing import Any

import numpy as np

from saeflow.config import TracrConfig
from saeflow.groundtruth.cases import get_case
from saeflow.jobs.job import Job
from saeflow.text.tokens import open_tokens, write_unpacked_rows

SEEDS = {"train": 0, "held_out": 1}  # of sampled rows; a model trains on rows of yet another seed
MODEL_ROWS_SEED = 2


def write_case_rows(job: Job) -> str:
    """All rows of a case, the same in both splits; or, where there are too many, a sample for each."""
    config = job.config
    case = get_case(config["corpus"]["case"])
    rows = case.rows(config["n_rows"], SEEDS[config["split"]])
    attributes = {"prepend_bos": True, "bos_token_id": case.program.token_id("BOS"), "split": config["split"]}
    with job.writing() as folder:
        write_unpacked_rows(folder, rows, f"case {case.number}", attributes | {"case": case.number})
    return f"wrote {len(rows):,} rows of case {case.number} to {job.path}/"


def make_model(job: Job) -> str:
    """Compiles, trains or reads a model, and measures it. `curve.parquet`: a row a check of the training;
    `effects.parquet`, of a model that is published: what each node does, as InterpBench measures it."""
    import pandas as pd
    import torch

    from saeflow.groundtruth.effects import node_effects
    from saeflow.groundtruth.folder import write_model
    from saeflow.groundtruth.interpbench import published_digest, read_interpbench
    from saeflow.groundtruth.network import Network
    from saeflow.groundtruth.training import Quality, Truth, align, pairs, train_small
    from saeflow.groundtruth.training import quality as measure_quality

    config = job.config["tracr"]
    case = get_case(config["case"])
    tables: dict[str, pd.DataFrame] = {}
    if config["method"] == "compiled":
        network = Network(case.compiled.config, case.compiled.weights)
        truth = Truth(case, case.rows(1000, MODEL_ROWS_SEED))
        correct = truth.correct(network(torch.from_numpy(truth.rows)).output, truth.values[case.program.output])
        quality = Quality(float(correct.mean()), {}, {})
    elif config["method"] == "published":
        with job.reading("published", published_digest, config["content"]) as path:
            network = Network(*read_interpbench(path))
        truth, alignment = Truth(case, case.rows(1000, MODEL_ROWS_SEED)), align(case, network.config)
        drawn = pairs(len(truth.rows))
        quality = measure_quality(network, truth, alignment, *drawn)
        tables["effects"] = node_effects(network, truth, alignment, *drawn)
    else:
        rows = case.rows(config["n_rows"], MODEL_ROWS_SEED)
        trained = train_small(case, rows, TracrConfig(**config))
        network, quality = trained.network, trained.quality
        tables["curve"] = pd.DataFrame(trained.curve)
    with job.writing() as folder:
        write_model(folder, case, network.config, network.weights(), config | quality._asdict())
        for name, table in tables.items():
            table.to_parquet(folder / f"{name}.parquet")
    sentence = f"accuracy {quality.accuracy:.4f}"
    if quality.iia:
        sentence += (
            f", IIA {min(quality.iia.values()):.4f}, strict accuracy {min(quality.strict.values()):.4f} (worst node)"
        )
    return f"case {case.number}, {config['method']}: {sentence}, in {job.path}/"


def recover_jobs(jobs: list[Job]) -> list[dict[str, Any]]:
    """Compares dictionaries of one model with what is known of it. Each folder gets `summary.json`, `labels.parquet`,
    `states.parquet`, `duplicates.json`, `contexts.parquet` and `latents.html`, and what they are compared with:
    `truth.parquet` and `nodes.parquet`.

    Raises `FitError` for a dictionary of another model.
    """
    import torch

    from saeflow.dictionaries import load_dictionary
    from saeflow.dictionaries.fitting import check_fit
    from saeflow.groundtruth.faithfulness import compare_jacobians, faithfulness, interchange_accuracy, true_jacobians
    from saeflow.groundtruth.folder import read_model
    from saeflow.groundtruth.labels import label, page, predicates, states, top_contexts, two_states, without_leaks
    from saeflow.groundtruth.record import by_state, losses, node_table, state_names, truth_table
    from saeflow.groundtruth.recovery import all_duplicates, recovery, redundancy
    from saeflow.groundtruth.training import Truth
    from saeflow.models.folder import read_geometry

    model_folder = jobs[0].input("groundtruth")
    case, network = read_model(model_folder)
    model = json.loads((model_folder / "quality.json").read_text())
    rows = open_tokens(jobs[0].input("tokens"))[:].astype(np.int64)
    truth, against = Truth(case, rows), predicates(case, rows)
    with torch.no_grad():
        clean = network(torch.from_numpy(rows))
    known = cache(partial(true_jacobians, network, clean))
    summaries = []
    for job in jobs:
        (train_folder,), part = job.inputs("train") + job.inputs("foreign"), job.config.get("part")
        folder = train_folder / part if part else train_folder
        dictionary = load_dictionary(folder)
        check_fit(dictionary, folder, model_folder, job.config["model"], read_geometry(model_folder))
        spec = dictionary.spec
        with torch.no_grad():
            x = clean.at(spec.hook_name).flatten(0, 1)
            f = without_leaks(dictionary.encode(x).double().numpy())
            y, reconstruction = clean.at(spec.hook_name_out).flatten(0, 1), dictionary.forward(x)
        state = states(case, rows, spec.hook_name_out)
        names_of_states = state_names(case, rows, spec.hook_name_out, state)
        labels, contexts = label(f, against), top_contexts(case, rows, f)
        labels = labels.merge(two_states(f, state, names_of_states), on="latent")
        name, amount = spec.amount
        names = ("kind", "activation", "skip", "saelens", "hook_name", "hook_name_out", "d_sae", "seed")
        summary = {"train_key": train_folder.name, "model_key": model_folder.name, "case": case.number}
        summary |= {"method": model["method"], "model_seed": model.get("seed"), "amount_name": name, "amount": amount}
        summary |= {
            "source": spec.origin.source or "",
            "part": part,
            "jacobian_coefficient": spec.options.get("jacobian_coefficient"),
        }
        summary |= {n: getattr(spec, n) for n in names} | {"l0": float((f > 0).sum(1).mean())}
        summary |= losses(y.double().numpy(), reconstruction.double().numpy(), f)
        summary |= faithfulness(network, truth, dictionary) | interchange_accuracy(network, truth, dictionary)
        input = load_dictionary(train_folder / "input") if part == "output" else None
        summary |= compare_jacobians(network, clean, dictionary, input)
        if model["method"] == "compiled" and spec.hook_name_out.endswith("hook_mlp_out"):
            summary |= known(int(spec.hook_name_out.split(".")[1]))
        W_dec = dictionary.tensors["W_dec"].double().numpy()
        known_rows = W_dec if model["method"] == "compiled" else None
        hooks = spec.hook_name, spec.hook_name_out
        summary |= recovery(case, rows, hooks, x.double().numpy(), f, known_rows)
        groups = all_duplicates(W_dec, f)
        summary |= redundancy(groups, f, state)
        summaries.append(summary)
        with job.writing() as out:
            labels.to_parquet(out / "labels.parquet")
            by_state(names_of_states, state, f).to_parquet(out / "states.parquet")
            truth_table(case, rows).to_parquet(out / "truth.parquet")
            node_table(case, network.config).to_parquet(out / "nodes.parquet")
            (out / "duplicates.json").write_text(json.dumps(groups) + "\n")
            contexts.to_parquet(out / "contexts.parquet")
            title = f"case {case.number} ({model['method']} model), latents of {folder.name}"
            (out / "latents.html").write_text(page(title, labels, contexts))
            (out / "summary.json").write_text(json.dumps(summary, indent=1, allow_nan=False) + "\n")
    return summaries
