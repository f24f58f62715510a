"""Counts the Jacobian entries of TopK pairs around an MLP on held-out tokens."""

from saeflow.jobs.job import Job, run


def jacobian(jobs: list[Job]) -> str:
    from saeflow.jacobians.study import jacobian_job

    lines = []
    for job in jobs:
        summary = jacobian_job(job)
        lines.append(f"{summary['n_tokens']} tokens, RMS of J {summary['rms']:.4g}, in {job.path}/")
    return "\n".join(lines)


if __name__ == "__main__":
    run("jacobian", jacobian)
