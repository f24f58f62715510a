"""What a corpus or a model folder holds controls neither the terminal nor the page that shows it."""

import subprocess
import sys
import unicodedata

import pytest

from saeflow.config import ConfigError
from saeflow.config.checks import escape_controls
from saeflow.jacobians.pages import visible

HOSTILE = "a\x00b\x1b[31mc\x7fd\x9be\u202ef\u2028g\rh\x08i"


def test_no_control_character_is_left_and_all_else_is() -> None:
    """Against the Unicode database: categories Cc, Zl and Zp, and the characters of the bidirectional algorithm."""
    directions = {"LRE", "LRO", "RLE", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"}
    marks = {"\u061c", "\u200e", "\u200f"}
    for c in map(chr, range(0x3000)):
        controls = unicodedata.category(c) in ("Cc", "Zl", "Zp") or unicodedata.bidirectional(c) in directions
        wanted = (controls or c in marks) and c not in "\n\t"
        assert (escape_controls(c) != c) == wanted, ascii(c)
    assert escape_controls("a\x1b[31m\n\tä") == "a\\x1b[31m\n\tä"


def test_messages_of_refused_configurations_hold_none() -> None:
    error = str(ConfigError(f"corpus {HOSTILE}: no field"))
    assert "\x1b" not in error and "\\x1b[31mc" in error and "no field" in error


def test_tokens_on_pages_hold_none() -> None:
    assert visible("\n\t") == "↵→" and visible(" ä海") == " ä海"
    assert "\x00" not in visible(HOSTILE) and "\\x00" in visible(HOSTILE)


@pytest.mark.parametrize("options", [[], ["log.txt"]])
def test_the_log_holds_none(tmp_path, options) -> None:
    code = (
        "import logging, sys; from saeflow.jobs.log import start_log; start_log(*sys.argv[1:] or [None]);"
        "log = logging.getLogger('saeflow'); log.warning('%s', 'a\\x1b[31m');\n"
        "try: raise ValueError('b\\x1b[31m')\n"
        "except ValueError: log.exception('failed')"
    )
    command = [sys.executable, "-c", code, *options]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    text = done.stderr + "".join(file.read_text() for file in tmp_path.iterdir())
    assert "\x1b" not in text and "a\\x1b[31m" in text and "b\\x1b[31m" in text
