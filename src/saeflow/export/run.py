"""An export: a folder that appears whole or not at all, and never below results/."""

import contextlib
import json
import re
import shutil
from pathlib import Path
from typing import Any

from saeflow.config import ConfigError
from saeflow.config.labels import file_safe
from saeflow.export.card import model_card
from saeflow.export.formats import Format, format_named
from saeflow.export.subjects import subjects
from saeflow.planning.graph import Plan
from saeflow.storage.publish import beside, make_folder, publish, remove_leftovers

RECEIPT = "export.json"
"""Says that a folder was written by an export, which may replace it: its format and what is in it."""


def export(
    plan: Plan, name: str, to: str | Path | None = None, licence: str | None = None
) -> tuple[Path, dict[str, Any]]:
    """Writes the dictionaries of a finished experiment in the format `name` into the folder `to` (by default
    `exports/<format>/<experiment>`); returns the folder and what its `export.json` says.

    The folder is written beside its place and moved there when it is whole; an earlier export there is replaced.
    Raises `ConfigError` for a format or a licence that is none, a folder that is something else, and dictionaries that
    are not made, and `Refusal` where the format can express none of them.
    """
    chosen = format_named(name)
    if licence and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9.+-]*", licence):
        raise ConfigError(f"LICENSE={licence!r} is no identifier as Hugging Face has them, such as mit or cc-by-4.0")
    folder = _folder(plan, chosen, to)
    found = subjects(plan)
    new = [parent for parent in folder.parents if not parent.exists()]
    make_folder(folder.parent)
    remove_leftovers(folder)
    partial = beside(folder)
    partial.mkdir()
    try:
        about = {"format": chosen.name, "experiment": plan.experiment, **chosen.write(found, partial)}
        there = [subject for subject in found if subject.name in about["entries"]]
        (partial / "README.md").write_text(model_card(chosen, there, about, licence), encoding="utf-8")
        (partial / RECEIPT).write_text(json.dumps(about, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        publish(partial, folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        for parent in new:
            with contextlib.suppress(OSError):  # another export may have begun there
                parent.rmdir()
        raise
    return folder, about


def _folder(plan: Plan, chosen: Format, to: str | Path | None) -> Path:
    """Where an export goes. Raises `ConfigError` where it would touch what no export has written."""
    folder = Path(to or Path("exports") / chosen.name / file_safe(plan.experiment)).resolve()
    results = Path(plan.results).resolve()
    if folder.is_relative_to(results) or results.is_relative_to(folder):
        raise ConfigError(f"TO={folder} is within {results}, or around it, which exports leave alone: name another")
    if folder.exists() and not (folder / RECEIPT).is_file() and not (folder.is_dir() and not any(folder.iterdir())):
        raise ConfigError(
            f"{folder} is there, and no export wrote it (it has no {RECEIPT}): remove it, or name another with TO=…"
        )
    return folder
