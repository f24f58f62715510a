"""Says what `snakemake --config hydra="…"` would run and why, without running it; or freezes the plan for scripts."""

import argparse
import os
import sys
from pathlib import Path


def graph() -> str:
    """All stages, and an arrow for each that another needs; figures take what is drawn."""
    from saeflow.planning.stages import stages

    lines = ["digraph stages {", 'rankdir=LR; node [shape=box, style=rounded, fontname="sans-serif", fontsize=11]']
    for stage in stages().values():
        lines.append(f'"{stage.name}"')
        lines += [f'"{needed}" -> "{stage.name}"' for needed in stage.needs]
        lines += [f'"{stage.name}" -> "figures" [style=dashed]'] if stage.drawn != "never" else []
    return "\n".join([*lines, "}"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("overrides", nargs="*", help="Hydra overrides, such as experiment=demo dictionary.k=[8,16]")
    parser.add_argument("--conf", default=Path(__file__).resolve().parent.parent / "conf", help="folder of the groups")
    parser.add_argument(
        "--directory", help="that of the run, as of snakemake: results/ and relative paths are below it"
    )
    parser.add_argument("--freeze", metavar="FILE", help="also write the plan here, for running jobs by hand")
    parser.add_argument("--keys", action="store_true", help="also list every artifact, with its state")
    parser.add_argument("--graph", action="store_true", help="only print which stages read which, for Graphviz's dot")
    args = parser.parse_args()
    if args.graph:
        return print(graph())

    from saeflow.config import ConfigError
    from saeflow.planning.digests import DIGESTS_FILE
    from saeflow.planning.expansion import compose
    from saeflow.planning.explain import explain, sentence
    from saeflow.planning.machine import check_disk, notes
    from saeflow.planning.overrides import split

    try:
        conf, freeze = Path(args.conf).resolve(), Path(args.freeze or "").resolve()
        if args.directory:
            os.chdir(args.directory)
        plan = compose(conf, split(" ".join(args.overrides)), digests=DIGESTS_FILE)
        if args.keys:
            for stage, table in plan.stages.items():
                for key in table:
                    print(f"{'done   ' if key in plan.found[stage] else 'missing'}  {plan.folder(stage, key)}")
        print(sentence(explain(plan)))
        check_disk(plan)
        for note in notes(plan):
            print(note)
        if args.freeze:
            plan.freeze(freeze)
            print(f"wrote the plan to {args.freeze}")
    except (ConfigError, ValueError, OSError) as error:
        sys.exit(f"plan: {error}")


main()
