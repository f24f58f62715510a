"""Plans on disk: every run has a file of its own, named by its content, which all of its jobs read.

So an edit of `conf/`, or another run in the same folder, can neither change nor lose what a job that waits in a queue
was told to do.
"""

import contextlib
import json
import logging
import os
import time
from pathlib import Path

from saeflow.planning.digests import text_hash
from saeflow.planning.graph import Plan
from saeflow.planning.parts import MARKS

log = logging.getLogger("saeflow")
FOLDER = Path(".snakemake/plans")
RECORDS = (Path(".snakemake/metadata"), Path(".snakemake/incomplete"))
KEPT_DAYS = 60
"""No run is older than that; a plan counts as used when a run or one of its jobs reads it."""


def plan_file(plan: Plan) -> Path:
    """Where a plan is frozen: the same for the same plan, whoever freezes it."""
    return _file_of(plan.text)


def _file_of(text: str) -> Path:
    return FOLDER / f"{text_hash(text)}.json"


def freeze_run(plan: Plan) -> Path:
    """Freezes a plan for a run, and removes those that no run has used for `KEPT_DAYS` days, and marks of parts as old.
    Returns its file."""
    text = plan.text
    file = _file_of(text)
    if not file.is_file() or file.read_bytes() != text.encode():  # none, or one that a power cut tore
        plan.freeze(file)
    touch(file)
    oldest = time.time() - KEPT_DAYS * 86400
    for other in (*FOLDER.glob("*.json*"), *MARKS.rglob("*.part-*")):
        with contextlib.suppress(OSError):  # another run may do the same
            if other.stat().st_mtime < oldest:
                other.unlink()
    return file


def remove_torn_records() -> None:
    """Removes what Snakemake noted of files and cannot read any longer, as a failing disk leaves it: a run would end
    with a `UnicodeDecodeError` that names no file. Nothing depends on these notes here."""
    for file in (p for folder in RECORDS for p in folder.rglob("*") if p.is_file()):
        try:
            torn = not isinstance(json.loads(file.read_bytes() or b"{}"), dict)
        except ValueError:
            torn = True
        except FileNotFoundError:  # another run has removed it
            continue
        if torn:
            log.warning("%s is damaged: Snakemake's note of a file, removed", file)
            file.unlink(missing_ok=True)


def touch(file: str | Path) -> None:
    """Marks a frozen plan as used; nothing where the disk can only be read."""
    with contextlib.suppress(OSError):
        os.utime(file)
