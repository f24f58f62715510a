"""Caches activations: one forward pass fills the columns of one store.

python scripts/activations.py --plan .snakemake/plan.json --key STORE/COLUMN [--key STORE/COLUMN ...]
"""

from saeflow.jobs.job import Job, run


def activations(jobs: list[Job]) -> str:
    from saeflow.activations.caching import cache_jobs

    return cache_jobs(jobs)


if __name__ == "__main__":
    run("activations", activations)
