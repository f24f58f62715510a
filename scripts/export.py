"""Writes the dictionaries of a finished experiment in the format of another tool: see docs/exports.md.

python scripts/export.py saelens experiment=demo [--to FOLDER] [--license cc-by-4.0 --upload user/name]
"""

import logging
from pathlib import Path

from saeflow.config.checks import escape_controls
from saeflow.export.formats import format_named
from saeflow.export.run import export
from saeflow.export.upload import check_upload, upload
from saeflow.planning.command import parser_of, plan_of, refusals


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--to", type=Path, help="the folder to write; by default exports/<format>/<experiment>")
    parser.add_argument("--license", help="of what is exported, as Hugging Face calls it")
    parser.add_argument("--upload", metavar="USER/NAME", help="also put it there, on Hugging Face")
    parser.usage = "%(prog)s FORMAT OVERRIDES [options]"
    args = parser.parse_intermixed_args()
    name, *args.overrides = args.overrides or [""]
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    to = args.to and args.to.absolute()
    with refusals("export"):
        format_named(name)
        if args.upload:
            check_upload(args.upload, args.license)
        plan, _ = plan_of(args)
        folder, about = export(plan, name, to, args.license)
        for left, why in about["left_out"].items():
            print(escape_controls(f"left out: {left}: {why}"))
        print(f"{name}: {len(about['entries'])} dictionaries in {folder}/")
        if args.upload:
            print(f"uploaded to {upload(folder, args.upload, f'{name} of {plan.experiment}, by saeflow')}")


main()
