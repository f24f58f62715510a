"""Draws the figures of an experiment from its evaluations, training metrics and Jacobians."""

from saeflow.job import Job, run


def figures(jobs: list[Job]) -> str:
    import json

    import pandas as pd

    from saeflow.figures import Tables, draw

    (job,) = jobs
    evaluations = pd.DataFrame([json.loads((f / "summary.json").read_text()) for f in job.inputs("evaluate")])
    identity = ["train_key", "kind", "activation", "skip", "saelens", "source", "amount", "amount_name"]
    identity += ["hook_name", "hook_name_out"]
    curves = [pd.read_parquet(f / "metrics.parquet").assign(train_key=f.name) for f in job.inputs("train")]
    training = pd.concat(curves).merge(evaluations[identity], on="train_key") if curves else pd.DataFrame()
    pairs = []
    for folder in job.inputs("jacobian"):
        summary = json.loads((folder / "summary.json").read_text())
        names = {n: summary[n] for n in ("k", "hook_name", "hook_name_out")}
        pairs.append(pd.read_parquet(folder / "histogram.parquet").assign(jacobian_key=folder.name, **names))
    resamples = [
        pd.read_parquet(f / "resamples.parquet").assign(train_key=key)
        for f, key in zip(job.inputs("evaluate"), evaluations["train_key"], strict=True)
    ]
    stacks = pd.DataFrame([json.loads((f / "summary.json").read_text()) for f in job.inputs("stack")])
    jacobians = pd.concat(pairs) if pairs else pd.DataFrame()
    tables = Tables(evaluations, training, jacobians, pd.concat(resamples), evaluations["confidence"].max(), stacks)
    with job.writing() as folder:
        for name in job.config["figures"]:
            draw(name, tables, folder)
    return f"wrote {', '.join(job.config['figures'])} (.png, .pdf, .csv) to {job.path}/"


if __name__ == "__main__":
    run("figures", figures)
