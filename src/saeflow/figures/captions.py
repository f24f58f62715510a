"""What stands below a figure: what is seen, from `workflow/report/` or the figure's own sentence, and of what data.

Snakemake's report reads captions as reStructuredText from files, the front page as HTML.
"""

import functools
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from saeflow.config.checks import escape_controls, html_text
from saeflow.figures.registry import declared
from saeflow.planning.explain import counted
from saeflow.storage.publish import publish_text

_TOLD = ("seed", "model_name", "n_tokens", "n_documents", "confidence")
_NOT_WRITTEN = "The table behind it is ``{}.csv``."


def caption(name: str, written: str | Path, folder: str | Path, data: str = "") -> str:
    """Path of a figure's caption for Snakemake's report: what `text_of` says, in a file in `folder`, with what the
    figure is of (`about`) behind it."""
    own = Path(written).resolve() / f"{name}.rst"
    if (own.is_file() and not data) or (not own.is_file() and name not in declared()):
        return str(own)  # the job refuses a name that no figure has, and says which there are
    path = Path(folder).resolve() / f"{name}.rst"
    text = "\n\n".join(part for part in (text_of(name, written).rstrip(), as_rst(data)) if part) + "\n"
    if not path.is_file() or path.read_text() != text:  # several processes may parse the rules at once
        publish_text(path, text)
    return str(path)


def text_of(name: str, written: str | Path) -> str:
    """What is seen in a figure, as reStructuredText: `<written>/<name>.rst` where somebody wrote one, else the figure's
    sentence."""
    own = Path(written) / f"{name}.rst"
    if own.is_file():
        return own.read_text(encoding="utf-8")
    sentence = declared()[name].sentence.replace("`", "``").replace("|", r"\|")  # |J| would be a reference
    return f"{sentence} {_NOT_WRITTEN.format(name)}\n"


def as_html(text: str) -> str:
    """The few signs of reStructuredText that captions have, as HTML."""
    escaped = html_text(" ".join(text.split()))
    escaped = re.sub(r"``(.+?)``", r"<code>\1</code>", escaped)
    return re.sub(r"(?<![\w*])\*(\S(?:.*?\S)?)\*", r"<em>\1</em>", escaped).replace("\\|", "|")


def about(results: str | Path, needs: Mapping[str, Iterable[str]], stage: str) -> str:
    """Of what data a figure of a stage is: how many artifacts, on how many tokens of how many documents, which seeds,
    what intervals cover; as far as summaries say it. A training has none: what judged the dictionaries tells."""
    shown = [stage, *(name for name in ("evaluate", "recover") if stage == "train")]
    found = [row for name in shown for key in needs.get(name, ()) if (row := _summary(Path(results) / name / key))]
    keys = list(needs.get(stage, ()))
    if not keys:
        return ""
    told = [counted(stage, len(keys))]
    seeds = _values(found, "seed")
    told += [f"seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}"] if 0 < len(seeds) <= 8 else []
    told += [f"{len(seeds)} seeds"] if len(seeds) > 8 else []
    told += [f"model {', '.join(_values(found, 'model_name'))}"] if _values(found, "model_name") else []
    tokens, documents = _range(found, "n_tokens"), _range(found, "n_documents")
    if tokens and stage != "train":
        told.append(f"{tokens} tokens" + (f" of {documents} held-out documents" if documents else ""))
    confidence = _values(found, "confidence")
    if len(confidence) == 1 and stage != "train":
        told.append(f"intervals of {100 * float(confidence[0]):g} % over documents")
    return f"Data: {'; '.join(told)}."


@functools.cache
def _summary(folder: Path) -> dict[str, Any]:
    """What captions say of it, read once for all figures; empty where there is none that is whole."""
    try:
        held = dict(json.loads((folder / "summary.json").read_bytes()))
    except (OSError, ValueError, TypeError):
        return {}
    return {name: held[name] for name in _TOLD if name in held}


def _values(rows: list[dict[str, Any]], name: str) -> list[Any]:
    found = {row[name] for row in rows if row.get(name) is not None and not isinstance(row[name], list | dict)}
    return sorted(found, key=lambda value: (str(type(value)), value))


def _range(rows: list[dict[str, Any]], name: str) -> str:
    found = [value for value in _values(rows, name) if isinstance(value, int)]
    if not found:
        return ""
    return f"{found[0]:,}" if len(found) == 1 else f"{found[0]:,} to {found[-1]:,}"


def as_rst(text: str) -> str:
    """Plain text as reStructuredText, in which braces are Jinja's. For Snakemake, which renders both."""
    escaped = re.sub(r"([\\`*_|<>])", r"\\\1", escape_controls(text))
    return re.sub(r"[{}]", lambda brace: f'{{{{ "{brace[0]}" }}}}', escaped)
