"""Draws the figures of an experiment from its evaluations, training metrics and Jacobians."""

from saeflow.jobs.command import run
from saeflow.jobs.job import Job


def figures(jobs: list[Job]) -> str:
    import json

    import pandas as pd

    from saeflow.dictionaries.layouts import part_folders
    from saeflow.figures.figures import Tables, draw
    from saeflow.heads.folder import read_head_studies
    from saeflow.jacobians.figures import read_histograms, read_studies

    (job,) = jobs
    if job.inputs("recover"):  # an experiment on a model whose algorithm is known
        from saeflow.groundtruth.figures import draw_job

        return draw_job(job)
    evaluations = pd.DataFrame([json.loads((f / "summary.json").read_text()) for f in job.inputs("evaluate")])
    evaluations["part"] = evaluations["part"].fillna("")  # input or output, of what was trained as a pair
    identity = ["train_key", "part", "kind", "activation", "skip", "saelens", "source", "amount", "amount_name"]
    identity += ["hook_name", "hook_name_out", "hook_head_index", "sparsity", "jacobian_coefficient"]
    curves = []
    for made in job.inputs("train"):
        for folder in part_folders(made):
            part = "" if folder == made else folder.name
            curve = pd.read_parquet(folder / "metrics.parquet").rename(columns={"sparsity": "sparsity_term"})
            curves.append(curve.assign(train_key=made.name, part=part))
    training = pd.concat(curves).merge(evaluations[identity], on=["train_key", "part"]) if curves else pd.DataFrame()
    resamples, l0 = (
        [
            pd.read_parquet(f / f"{name}.parquet").assign(dictionary_key=key)
            for f, key in zip(job.inputs("evaluate"), evaluations["dictionary_key"], strict=True)
        ]
        for name in ("resamples", "l0")
    )
    tables = Tables(
        evaluations,
        training,
        read_histograms(job.inputs("jacobian")),
        read_studies(job.inputs("jacobian"), evaluations),
        pd.concat(resamples),
        evaluations["confidence"].max(),
        pd.DataFrame([json.loads((f / "summary.json").read_text()) for f in job.inputs("stack")]),
        pd.concat(l0),
        tuple(read_head_studies(job.inputs("heads"))),
    )
    with job.writing() as folder:
        for name in job.config["figures"]:
            draw(name, tables, folder)
    return f"wrote {', '.join(job.config['figures'])} (.png, .pdf, .csv) to {job.path}/"


if __name__ == "__main__":
    run("figures", figures)
