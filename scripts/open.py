"""Opens results/index.html, the front page, in a browser, or says where it is where there is none."""

import os
import shutil
import subprocess
import sys

from saeflow.planning.command import enter, fail, parser_of
from saeflow.results.front import write_front_page


def opener() -> list[str]:
    """The command that opens an address on this desktop; empty where there is no desktop."""
    if sys.platform == "darwin":
        return ["open"]
    shown = os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")
    return ["xdg-open"] if shown and shutil.which("xdg-open") else []


def main() -> None:
    args = parser_of(__doc__, overrides=None).parse_args()
    enter(args)
    page = write_front_page("results", args.conf)
    if page is None:
        fail("open: there is nothing below results/ yet; run an experiment first: make demo")
    address = page.absolute().as_uri()
    command = opener()
    if not command or subprocess.run([*command, address], stderr=subprocess.DEVNULL).returncode:
        print(f"no browser opens here: {address}")


main()
