"""Makes artifacts of one stage from a frozen plan, as the workflow's rules do.

python scripts/job.py train --plan plan.json --key KEY [--key KEY ...]
"""

from saeflow.jobs.command import main

main()
