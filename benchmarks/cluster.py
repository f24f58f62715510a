"""What a cluster costs beside the work: a job through Slurm against the same job here, and the plan of 20,000 points.

Slurm is the test's, of two nodes on this machine (tests/slurm/up.sh: as root, on Debian or Ubuntu). Six small jobs run
one after another, here and through Slurm; the difference a job is two more starts of Snakemake, Slurm's own time, and
the wait until Snakemake looks at the queue again. The dry run is the faster of two. `remote_over_local` is of shuffled
batches of 256 MB of activations in a bucket of a server here, against the same from the disk (_remote.py). Last line:
{"slurm_overhead_per_job_s", "dry_run_s_20000", "remote_over_local", "remote_over_local_in_quarters"}.
"""

import json
import sys
import tempfile
from pathlib import Path

from _dry_runs import ROOT, dry_run
from _remote import remote_over_local

sys.path.insert(0, str(ROOT / "tests/slurm"))
from cluster import daemons, overhead, shared


def main() -> None:
    with tempfile.TemporaryDirectory(dir="/var/tmp") as work:
        folder = Path(work)
        try:
            daemons("up", *shared(folder))
            a_job = overhead(folder)
        finally:
            daemons("down")
        print(f"{a_job:.1f} s a job", file=sys.stderr)
        (folder / "empty").mkdir()
        plan = min(dry_run(20_000, str(folder / "empty")) for _ in range(2))
        (folder / "remote").mkdir()
        remote = remote_over_local(folder / "remote", n_tokens=131_072, d=512)
    print(json.dumps({"slurm_overhead_per_job_s": round(a_job, 1), "dry_run_s_20000": round(plan, 1), **remote}))


main()
