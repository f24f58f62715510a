"""Evaluates the dictionaries of several layers in the model at once."""

from saeflow.jobs.job import Job, run


def stack(jobs: list[Job]) -> str:
    from saeflow.evaluation.stack import stack_job

    lines = []
    for job in jobs:
        s = stack_job(job)
        layers = ", ".join(map(str, s["layers"]))
        lines.append(
            f"{job.path}/: layers {layers} at once, CE {s['ce_replaced']:.4f} (clean {s['ce_clean']:.4f}, zero-ablated "
            f"{s['ce_zero']:.4f}, mean-ablated {s['ce_mean']:.4f}), KL {s['kl']:.4f}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    run("stack", stack)
