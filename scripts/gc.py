"""Lists what lies below results/ that nobody refers to any longer; given the token of a list, removes what is on it.

python scripts/gc.py [--keep OVERRIDES] [--without EXPERIMENTS] [--days 7] [--remove TOKEN]
"""

import shlex
import sys
from pathlib import Path

from saeflow.config.checks import escape_controls
from saeflow.planning.command import enter, parser_of, refusals
from saeflow.planning.digests import DIGESTS_FILE
from saeflow.planning.explain import readable
from saeflow.planning.garbage import listing, overview, remove
from saeflow.planning.keeping import experiments_of, referred_to


def main() -> None:
    parser = parser_of(__doc__, overrides=None)
    parser.add_argument("--keep", default="", help="overrides of other experiments that count, with ; between them")
    parser.add_argument("--without", default="", help="experiments that do not count, where they cannot be planned")
    parser.add_argument("--days", type=float, default=7.0, help="what was made or run in the last so many stays")
    parser.add_argument(
        "--remove", default="", metavar="TOKEN", help="remove exactly what the list with this token has"
    )
    args = parser.parse_args()
    without = args.without.replace(",", " ").split()
    again = {"DIRECTORY": args.directory, "KEEP": args.keep, "WITHOUT": " ".join(without)}
    again |= {"DAYS": f"{args.days:g}" if args.days != parser.get_default("days") else ""}
    variables = [f"{name}={shlex.quote(value)}" for name, value in again.items() if value and value != "."]
    freed = left = 0
    with refusals("gc"):
        enter(args)
        results = Path("results")
        kept = referred_to(args.conf, results, experiments_of(args.keep), without, args.days, DIGESTS_FILE)
        found = listing(results, kept, args.days)
        if not args.remove:
            return print(escape_controls(overview(found, " ".join(["make gc", *variables]))))
        for item, why in remove(found, args.remove):
            print(escape_controls(f"{f'left ({why})' if why else 'removed'}: {item.name}"), flush=True)
            freed += 0 if why else item.size.n_bytes
            left += bool(why)
        print(f"freed {readable(freed)}" + (f"; {left} left: make gc lists what may still go" if left else ""))
    sys.exit(bool(left))


main()
