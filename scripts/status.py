"""Says how far each unfinished job of an experiment is: running, queued, failed and why, stopped, or not started."""

from collections import Counter

from saeflow.config.checks import escape_controls
from saeflow.jobs.status import unfinished
from saeflow.planning.command import parser_of, plan_of, refusals


def main() -> None:
    args = parser_of(__doc__).parse_args()
    with refusals("status"):
        plan, _ = plan_of(args)
    states = list(unfinished(plan))
    for state in states:
        print(escape_controls(str(state)))
    counts = Counter(state.state for state in states)
    left = ", ".join(f"{n} {'job' if n == 1 else 'jobs'} {state}" for state, n in counts.items())
    there = sum(map(len, plan.found.values()))
    print(f"{plan.experiment}: {there} artifacts are there; {left or 'nothing is left to do'}")


main()
