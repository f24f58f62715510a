"""Measures what evaluations at a hook are compared with: the clean model, and the hook ablated."""

from saeflow.jobs.job import Job, run


def baseline(jobs: list[Job]) -> str:
    from saeflow.evaluation.baseline import baseline_jobs
    from saeflow.evaluation.sums import columns

    lines = []
    for job, found in zip(jobs, baseline_jobs(jobs), strict=True):
        total = {name: values.sum() for name, values in columns(found.sums.batches).items()}
        clean, zero, mean = (total[f"ce_{name}"] / total["n_predictions"] for name in ("clean", "zero", "mean"))
        lines.append(f"{job.path}/: CE {clean:.4f} clean, {zero:.4f} zero-ablated, {mean:.4f} mean-ablated")
    return "\n".join(lines)


if __name__ == "__main__":
    run("baseline", baseline)
