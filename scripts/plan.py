"""Says what `snakemake --config hydra="…"` would run and why, without running it; or freezes the plan for scripts."""

from collections import Counter
from pathlib import Path

from saeflow.planning.command import parser_of, plan_of, refusals
from saeflow.planning.explain import costs, explain, sentence
from saeflow.planning.machine import check_disk, jobs, notes
from saeflow.planning.remote import check_remote, notes_of_bucket
from saeflow.planning.stages import stages


def graph() -> str:
    """All stages, and an arrow for each that another needs; figures take what is drawn."""
    lines = ["digraph stages {", 'rankdir=LR; node [shape=box, style=rounded, fontname="sans-serif", fontsize=11]']
    for stage in stages().values():
        lines.append(f'"{stage.name}"')
        lines += [f'"{needed}" -> "{stage.name}"' for needed in stage.needs]
        lines += [f'"{stage.name}" -> "figures" [style=dashed]'] if stage.drawn != "never" else []
    return "\n".join([*lines, "}"])


def main() -> None:
    parser = parser_of(__doc__, "Hydra overrides, such as experiment=demo dictionary.k=[8,16]")
    parser.add_argument("--freeze", metavar="FILE", help="also write the plan here, for running jobs by hand")
    parser.add_argument("--keys", action="store_true", help="also list every artifact, with its state")
    parser.add_argument("--graph", action="store_true", help="only print which stages read which, for Graphviz's dot")
    args = parser.parse_args()
    if args.graph:
        return print(graph())

    freeze = Path(args.freeze or "").resolve()
    with refusals("plan"):
        plan, _ = plan_of(args)
        if args.keys:
            for stage, table in plan.stages.items():
                for key in table:
                    print(f"{'done   ' if key in plan.found[stage] else 'missing'}  {plan.folder(stage, key)}")
        explanation = explain(plan)
        print(sentence(explanation))
        if table := costs(explanation, Counter(stage for stage, _ in jobs(plan))):
            print(f"\n{table}\n")
        check_disk(plan)
        check_remote(plan)
        for note in [*notes(plan), *notes_of_bucket(plan)]:
            print(note)
        if args.freeze:
            plan.freeze(freeze)
            print(f"wrote the plan to {args.freeze}")


main()
