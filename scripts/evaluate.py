"""Evaluates dictionaries of one model on the same held-out tokens; each has a folder of its own."""

from saeflow.jobs.job import Job, run


def evaluate(jobs: list[Job]) -> str:
    from saeflow.evaluation.evaluate import evaluate_jobs

    summaries = evaluate_jobs(jobs)
    lines = [
        f"{job.path}/: L0 {s['l0']:.1f}, CE {s['ce_replaced']:.4f} (clean {s['ce_clean']:.4f}, zero-ablated "
        f"{s['ce_zero']:.4f}, mean-ablated {s['ce_mean']:.4f})"
        for job, s in zip(jobs, summaries, strict=True)
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    run("evaluate", evaluate)
