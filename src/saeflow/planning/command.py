"""What the scripts about an experiment share: their options, its plan, and how a refusal ends them."""

import argparse
import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

from saeflow.config import ConfigError
from saeflow.config.checks import escape_controls, loud
from saeflow.planning.digests import DIGESTS_FILE
from saeflow.planning.expansion import compose
from saeflow.planning.graph import Plan
from saeflow.planning.overrides import split

CONF = Path(__file__).resolve().parents[3] / "conf"


def parser_of(about: str | None, overrides: str | None = "the Hydra overrides of the run") -> argparse.ArgumentParser:
    """`overrides`: their help; None for a script that takes none."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    if overrides:
        parser.add_argument("overrides", nargs="*", help=overrides)
    parser.add_argument("--conf", default=CONF, type=Path, help="folder of the groups")
    parser.add_argument(
        "--directory", help="that of the run, as of snakemake: results/ and relative paths are below it"
    )
    return parser


def enter(args: argparse.Namespace) -> None:
    """Goes where the run is; paths among the options are of where the script was called."""
    args.conf = args.conf.resolve()
    if args.directory:
        os.chdir(args.directory)


def plan_of(args: argparse.Namespace) -> tuple[Plan, list[str]]:
    """The plan of the overrides, and these one by one. Raises `ConfigError`."""
    enter(args)
    overrides = split(" ".join(args.overrides))
    return compose(args.conf, overrides, digests=DIGESTS_FILE), overrides


@contextlib.contextmanager
def refusals(script: str) -> Iterator[None]:
    """Ends the process with one sentence where the block refuses something."""
    try:
        yield
    except (ConfigError, ValueError, OSError) as error:
        fail(f"{script}: {error}")


def fail(reason: str) -> NoReturn:
    """Ends the process with a reason, in red on a terminal."""
    sys.exit(loud(escape_controls(reason), sys.stderr))
