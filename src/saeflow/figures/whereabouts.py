"""Where figures, tables, report and front page of a finished experiment are: the last lines of a run."""

import shlex
from pathlib import Path

from saeflow.planning.graph import Plan
from saeflow.planning.ledger import ledger_file
from saeflow.storage.receipts import RECEIPT

ROOT = Path(__file__).resolve().parents[3]
"""The checkout."""


def report_is_current(plan: Plan) -> bool:
    """Whether `report.html` shows the figures and the ledger that are there."""
    (key,) = plan.stages["figures"]
    report, receipt = Path(plan.results) / "report.html", plan.folder("figures", key) / RECEIPT
    shown = [receipt, *(file for file in [ledger_file(plan)] if file.is_file())]
    return (
        receipt.is_file()
        and report.is_file()
        and report.stat().st_mtime >= max(file.stat().st_mtime for file in shown)
        and report_names(report, key)
    )


def report_names(report: Path, key: str) -> bool:
    """Whether a report is of the figures with that key."""
    return report.is_file() and key in report.read_text(errors="replace")


def whereabouts(plan: Plan, overrides: list[str]) -> str:
    """A line each of figures, tables, costs and report, which says how to make it where there is none of this, and of
    the front page, as an address that a browser opens."""
    (key,) = plan.stages["figures"]
    folder = plan.folder("figures", key)
    front = (Path(plan.results) / "index.html").absolute()
    page = [f"page:    {front.as_uri()}"] if front.is_file() else []
    if not plan.done("figures", key):
        return "\n".join([f"artifacts: {plan.results}/ (no figures: not all was asked for)", *page])
    figures = sorted(path.stem for path in folder.glob("*.png"))
    others = sorted(p.name for p in folder.glob("*.*") if p.suffix in (".csv", ".html") and p.stem not in figures)
    here = "" if Path.cwd() == ROOT else f"DIRECTORY={shlex.quote(str(Path.cwd()))} "
    how = f"none of these yet: make report {here}HYDRA={shlex.quote(' '.join(overrides))}"
    how = f"{plan.results}/report.html" if report_is_current(plan) else how
    tables = [*others, *(["a .csv beside each figure"] if figures else [])]
    ledger = ledger_file(plan)
    costs = [f"costs:   {ledger} (.csv, .txt)"] if ledger.is_file() else []
    return "\n".join(
        [
            f"figures: {folder}/ ({', '.join(figures) or 'none'})",
            f"tables:  {folder}/ ({', '.join(tables) or 'none'})",
            *costs,
            f"report:  {how}",
            *page,
        ]
    )
