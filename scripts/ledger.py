"""Says what an experiment has cost by stage and in all, and what was saved; writes it to results/ledger/."""

from saeflow.planning.command import parser_of, plan_of, refusals
from saeflow.planning.ledger import ABOUT, ledger_file, save_ledger


def main() -> None:
    args = parser_of(__doc__).parse_args()
    with refusals("ledger"):
        plan, _ = plan_of(args)
        print(save_ledger(plan))
    if ledger_file(plan).is_file():
        print(f"{ABOUT} The same in seconds and bytes: {ledger_file(plan)} (.csv)")
    if left := sum(map(len, plan.to_make.values())):
        print(f"{left} artifacts are still to be made, which count nowhere")


main()
