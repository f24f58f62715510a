"""Makes artifacts of one stage from a frozen plan, as the workflow's rules do.

python scripts/job.py train --plan plan.json --key KEY [--key KEY ...]
"""

import signal

signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])  # it waits until `stoppable` can answer

from saeflow.jobs.signals import stoppable  # noqa: E402

with stoppable():
    from saeflow.jobs.command import main

    main()
