"""How a results folder and what is in it show themselves: as text, and as HTML in a notebook. All text is escaped."""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from saeflow.config.checks import escape_controls, html_text
from saeflow.planning.explain import counted, readable

if TYPE_CHECKING:
    from saeflow.results.lineage import Chain
    from saeflow.results.run import Results

SETTINGS_SHOWN = 60


def table_html(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A plain table, of text."""
    heads = "".join(f'<th style="text-align:left">{html_text(name)}</th>' for name in head)
    lines = ("".join(f'<td style="text-align:left">{html_text(cell)}</td>' for cell in row) for row in rows)
    return f"<table><tr>{heads}</tr>{''.join(f'<tr>{line}</tr>' for line in lines)}</table>"


# -------------------------------------------------------------------- a results folder
def as_text(run: "Results") -> str:
    """What there is, in a few lines."""
    lines = [f"results of saeflow in {escape_controls(str(run.path))}"]
    lines += [f"  {what}, {size}" for _, what, size in _stages(run)]
    lines.append(f"  experiments with figures: {', '.join(run.experiments) or 'none'}")
    return "\n".join([*lines, *_left_out(run)])


def as_html(run: "Results") -> str:
    """The same as a table, with what to ask next."""
    asks = {"train": "run.dictionary(key)", "evaluate": "run.evaluations()", "figures": "run.figure(name)",
            "features": "run.features(key)[latent]", "activations": "run.activations(hook)"}  # fmt: skip
    rows = [(stage, what, size, asks.get(stage, "")) for stage, what, size in _stages(run)]
    experiments = ", ".join(run.experiments) or "none"
    left_out = "".join(f"<p>{html_text(line.strip())}</p>" for line in _left_out(run))
    return (
        f"<p>Results of saeflow in <code>{html_text(run.path)}</code>; experiments with figures: "
        f"<b>{html_text(experiments)}</b></p>{table_html(('stage', 'there are', 'on disk', 'ask'), rows)}{left_out}"
    )


def _stages(run: "Results") -> list[tuple[str, str, str]]:
    """Of each stage that has something: its name, how many artifacts, how large."""
    whole = run._disk.whole
    sizes = {stage: sum(receipt.get("bytes", 0) for receipt in found.values()) for stage, found in whole.items()}
    return [(stage, counted(stage, len(found)), readable(sizes[stage])) for stage, found in whole.items() if found]


def _left_out(run: "Results") -> list[str]:
    lost = run.left_out
    if not lost:
        return []
    first = f"{lost[0].stage} {lost[0].key}: {lost[0].problem}"
    return [f"  not shown, since not whole: {len(lost)} (run.left_out), such as {escape_controls(first)}"]


# -------------------------------------------------------------------- a chain of provenance
def chain_html(chain: "Chain") -> str:
    """A row a step, and the hashes of what is from outside."""
    rows = [(step.title, settings_text(step.read), step.cost, step.made, step.key) for step in chain]
    sources = "".join(
        f"<p>{html_text(name)}: <code>{html_text(', '.join(found))}</code></p>"
        for name, found in chain.contents.items()
    )
    return table_html(("made", "read", "cost", "when, where, by what", "key"), rows) + sources


def settings_text(read: dict[str, object]) -> str:
    """Settings as overrides are written."""
    told = [f"{path}={value}" for path, value in read.items()]
    return ", ".join(told[:SETTINGS_SHOWN]) + (", …" if len(told) > SETTINGS_SHOWN else "")
