"""Reads a dictionary that another library made, and writes it as a SAELens folder."""

from saeflow.jobs.job import Job, run


def foreign(jobs: list[Job]) -> str:
    from saeflow.dictionaries.foreign import foreign_job

    lines = []
    for job in jobs:
        spec = foreign_job(job).spec
        lines.append(f"{job.path}/: {spec.kind} of {spec.d_sae} latents at {spec.hook_name}, {spec.activation}")
    return "\n".join(lines)


if __name__ == "__main__":
    run("foreign", foreign)
