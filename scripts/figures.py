"""Draws the figures of an experiment from its evaluations, training metrics and Jacobians."""

from saeflow.job import Job, run


def figures(jobs: list[Job]) -> str:
    import json

    import pandas as pd

    from saeflow.figures import Tables, draw

    (job,) = jobs
    if job.inputs("recover"):  # an experiment on a model whose algorithm is known
        from saeflow.groundtruth.figures import draw_job

        return draw_job(job)
    evaluations = pd.DataFrame([json.loads((f / "summary.json").read_text()) for f in job.inputs("evaluate")])
    identity = ["train_key", "kind", "activation", "skip", "saelens", "amount", "amount_name"]
    identity += ["hook_name", "hook_name_out"]
    training = pd.concat(
        [pd.read_parquet(f / "metrics.parquet").assign(train_key=f.name) for f in job.inputs("train")]
    ).merge(evaluations[identity], on="train_key")
    pairs = []
    for folder in job.inputs("jacobian"):
        summary = json.loads((folder / "summary.json").read_text())
        names = {n: summary[n] for n in ("k", "hook_name", "hook_name_out")}
        pairs.append(pd.read_parquet(folder / "histogram.parquet").assign(jacobian_key=folder.name, **names))
    tables = Tables(evaluations, training, pd.concat(pairs) if pairs else pd.DataFrame())
    with job.writing() as folder:
        for name in job.config["figures"]:
            draw(name, tables, folder)
    return f"wrote {', '.join(job.config['figures'])} (.png, .pdf, .csv) to {job.path}/"


if __name__ == "__main__":
    run("figures", figures)
