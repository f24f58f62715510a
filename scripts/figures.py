"""Draws the figures of an experiment from its evaluations, training metrics and Jacobians."""

from saeflow.job import Job, run


def figures(jobs: list[Job]) -> str:
    import json

    import pandas as pd

    from saeflow.figures import Tables, draw
    from saeflow.jacobian_figures import read_histograms, read_studies

    (job,) = jobs
    evaluations = pd.DataFrame([json.loads((f / "summary.json").read_text()) for f in job.inputs("evaluate")])
    evaluations["part"] = evaluations["part"].fillna("")  # input or output, of what was trained as a pair
    identity = ["train_key", "part", "kind", "activation", "skip", "saelens", "amount", "amount_name"]
    identity += ["hook_name", "hook_name_out", "jacobian_coefficient"]
    trained = []
    for folder in job.dictionaries():
        key, part = (folder.parent.name, folder.name) if folder.parent.name != "train" else (folder.name, "")
        trained.append(pd.read_parquet(folder / "metrics.parquet").assign(train_key=key, part=part))
    training = pd.concat(trained).merge(evaluations[identity], on=["train_key", "part"])
    folders = job.inputs("jacobian")
    tables = Tables(evaluations, training, read_histograms(folders), studies=read_studies(folders, evaluations))
    with job.writing() as folder:
        for name in job.config["figures"]:
            draw(name, tables, folder)
    return f"wrote {', '.join(job.config['figures'])} (.png, .pdf, .csv) to {job.path}/"


if __name__ == "__main__":
    run("figures", figures)
