"""Makes a blind set of features for people to judge."""

from saeflow.jobs.job import Job, run


def blind(jobs: list[Job]) -> str:
    from saeflow.evaluation.blind import blind_job

    lines = []
    for job in jobs:
        n = blind_job(job)
        lines.append(f"{job.path}/: dashboards.html with {n} features; fill in sheet.csv, do not look into secret/")
    return "\n".join(lines)


if __name__ == "__main__":
    run("blind", blind)
