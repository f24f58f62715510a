"""Studies how the heads of a layer, and the dictionaries of them, share and mix what they write."""

from saeflow.jobs.job import Job, run


def heads(jobs: list[Job]) -> str:
    from saeflow.heads.job import heads_job

    lines = []
    for job in jobs:
        s = heads_job(job)
        lines.append(
            f"{job.path}/: {s['n_heads']} heads of layer {s['layer']}, {len(s['dictionaries'])} dictionaries, "
            f"{s['n_tokens']} tokens; median cosine of two heads' outputs {s['median_cosine']:.3f} (rotated "
            f"{s['median_cosine_rotated']:.3f})"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    run("heads", heads)
