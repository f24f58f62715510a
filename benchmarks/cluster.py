"""What a cluster costs beside the work: a job through Slurm against the same job here, one caching that several jobs
share against one job, activations in a bucket against those on the disk, and the plan of 20,000 points.

Slurm is the test's, of two nodes on this machine (tests/slurm/up.sh: as root, on Debian or Ubuntu). Six small jobs run
one after another, here and through Slurm; the difference a job is two more starts of Snakemake, Slurm's own time, and
the wait until Snakemake looks at the queue again. The caching is of the demo's model, by jobs of one core each, two at
a time (_scatter.py). `remote_over_local` is of shuffled batches of 256 MB of activations, from a server here
(_remote.py). The dry run is the faster of two. `--only scatter` leaves out all else. Last line:
{"slurm_overhead_per_job_s", "scatter_1_over_8", "scatter_wall_s_1", "scatter_cpu_s_1", the same of 2, 4 and 8 parts,
"remote_over_local", "remote_over_local_in_quarters", "dry_run_s_20000"}.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

from _dry_runs import ROOT, dry_run
from _remote import remote_over_local
from _scatter import SHARD_TOKENS, scatter

sys.path.insert(0, str(ROOT / "tests/slurm"))
from cluster import daemons, overhead, shared


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=["scatter"], help="leave out all else")
    parser.add_argument("--tokens", type=int, default=24 * SHARD_TOKENS, help="that are cached")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir="/var/tmp") as work:
        folder = Path(work)
        shared_out = {name: float(f"{value:.3g}") for name, value in scatter(folder, args.tokens).items()}
        if args.only:
            return print(json.dumps(shared_out))
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
    last = {"dry_run_s_20000": round(plan, 1)}
    print(json.dumps({"slurm_overhead_per_job_s": round(a_job, 1)} | shared_out | remote | last))


main()
