"""What an experiment has cost, by stage: time of cores and GPUs, bytes on disk, memory, and what was found instead of
made, and so saved.

It is from what jobs left of themselves (`made.jsonl`, and where that has been deleted the receipts); what artifacts of
earlier versions did not say is counted as unknown, never guessed. It holds times, so it lies beside the artifacts:
`results/ledger/<experiment>.parquet`, the same as `.csv`, and as a table for people in `.txt`.
"""

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from saeflow.config.labels import file_safe
from saeflow.planning.explain import readable
from saeflow.planning.garbage import measure
from saeflow.planning.graph import Plan
from saeflow.planning.history import gpu_seconds, lines
from saeflow.planning.keeping import last_run
from saeflow.planning.stages import stages
from saeflow.storage.publish import publish_text, writing
from saeflow.storage.receipts import read_receipt

ALL, UNKNOWN = "all", "unknown"
ABOUT = (
    "What all artifacts took, by whichever run, and what the last run saved, because it found some of them: wall and "
    "GPU time, a share of each job's, and CPU time, of all cores. What earlier versions did not record is unknown."
)


class Time(NamedTuple):
    """Seconds that some artifacts took, of jobs that made several a share each: of what is known; None where there is
    something, and nothing is known of it."""

    wall_s: float | None
    cpu_s: float | None
    """Of all cores."""
    gpu_s: float | None
    """Wall seconds of jobs that had one."""
    wall_unknown: int
    """Artifacts of which nobody knows `wall_s` and `gpu_s`."""
    cpu_unknown: int


@dataclass(frozen=True)
class Row:
    """Of a stage, or of all."""

    stage: str
    artifacts: int
    """That are there, or have been."""
    made: int | None
    """Those that the last run had to make; None where its plan is gone."""
    found: int | None
    """Those that it found."""
    spent: Time
    """On all of them, by whichever run."""
    saved: Time | None
    """What those had taken that were found."""
    n_bytes: int
    """On disk now; of arrays that other experiments share, all."""
    peak_memory_bytes: int | None
    """Of the largest job of which an artifact is there."""

    def flat(self, experiment: str) -> dict[str, Any]:
        """As a row of a table."""
        saved = self.saved._asdict() if self.saved else dict.fromkeys(Time._fields)
        return {
            "experiment": experiment,
            "stage": self.stage,
            "artifacts": self.artifacts,
            "made": self.made,
            "found": self.found,
            **self.spent._asdict(),
            **{f"saved_{name}": value for name, value in saved.items()},
            "bytes": self.n_bytes,
            "peak_memory_bytes": self.peak_memory_bytes,
        }


def ledger(plan: Plan) -> list[Row]:
    """A row for each stage that has artifacts, in the order of the data flow, and one for all."""
    newest = {(line["stage"], line["key"]): line for line in lines(plan.results)}
    run, rows = (last_run(plan) or (None, None))[1], []
    for stage, table in plan.stages.items():
        receipts = {key: receipt for key in table if (receipt := read_receipt(plan.folder(stage, key)))}
        times = {
            key: time_of(newest.get((stage, key)), receipts.get(key))
            for key in table
            if key in receipts or (stage, key) in newest
        }
        folders = [plan.folder(stage, key) for key in receipts]
        paths = {path for folder in folders for path in (folder, *stages()[stage].outside(folder))}
        memory = [receipt["peak_memory_bytes"] for receipt in receipts.values() if "peak_memory_bytes" in receipt]
        if times:
            found = times.keys() & set(run["found"].get(stage, ())) if run else set()
            row = Row(
                stage,
                len(times),
                len(times.keys() & set(run["to_make"].get(stage, ()))) if run else None,
                len(found) if run else None,
                _sum(list(times.values())),
                _sum([times[key] for key in found]) if run else None,
                measure(paths).n_bytes,
                max(memory, default=None),
            )
            rows.append(row)
    return [*rows, _total(rows)] if rows else []


def _total(rows: list[Row]) -> Row:
    return Row(
        ALL,
        sum(row.artifacts for row in rows),
        None if rows[0].made is None else sum(row.made or 0 for row in rows),
        None if rows[0].found is None else sum(row.found or 0 for row in rows),
        _sum([row.spent for row in rows]),
        None if rows[0].saved is None else _sum([row.saved for row in rows if row.saved]),
        sum(row.n_bytes for row in rows),
        max((row.peak_memory_bytes for row in rows if row.peak_memory_bytes is not None), default=None),
    )


def time_of(line: dict[str, Any] | None, receipt: dict[str, Any] | None) -> Time:
    """What one artifact took: by the line that its job wrote last, or else by its receipt."""
    wall = cpu = gpu = None
    if line:
        wall, cpu = float(line["seconds"]), line.get("cpu_s")
        gpu = gpu_seconds(str(line["device"]), wall) if "device" in line else None
    elif receipt and "sharing" in receipt:
        wall, cpu, gpu = receipt["wall_s"] / receipt["sharing"], receipt["cpu_s"], receipt["gpu_s"]
    return Time(wall, cpu, gpu, int(wall is None), int(cpu is None))


def _sum(times: list[Time]) -> Time:
    def known(values: Iterable[float | None]) -> float | None:
        found = [value for value in values if value is not None]
        return round(sum(found), 3) if found or not times else None

    return Time(
        known(time.wall_s for time in times),
        known(time.cpu_s for time in times),
        known(time.gpu_s for time in times),
        sum(time.wall_unknown for time in times),
        sum(time.cpu_unknown for time in times),
    )


# -------------------------------------------------------------------- on disk, and for people
def save_ledger(plan: Plan) -> str:
    """Writes the ledger of an experiment below its results, where it has changed; returns it as a table for people."""
    import pandas as pd

    rows = ledger(plan)
    text, table = as_text(rows), pd.DataFrame([row.flat(plan.experiment) for row in rows])
    whole = ["made", "found", "saved_wall_unknown", "saved_cpu_unknown", "peak_memory_bytes"]
    seconds = [name for name in table if str(name).endswith("_s")]
    if rows:
        table = table.astype(dict.fromkeys(whole, "Int64") | dict.fromkeys(seconds, "Float64"))
    file = ledger_file(plan)
    csv = file.with_suffix(".csv")
    if rows and not (file.is_file() and csv.is_file() and csv.read_text() == table.to_csv(index=False)):
        publish_text(csv, table.to_csv(index=False))
        publish_text(file.with_suffix(".txt"), text + "\n")
        with writing(file) as partial:
            table.to_parquet(partial, index=False)
    return text


def ledger_file(plan: Plan) -> Path:
    """The Parquet file."""
    return Path(plan.results) / "ledger" / f"{file_safe(plan.experiment)}.parquet"


HEAD = ("stage", "artifacts", "made", "found", "wall", "CPU", "GPU", "on disk", "memory", "saved", "CPU saved")


def as_text(rows: list[Row], shown: Collection[str] = HEAD) -> str:
    """A table that reads as it is, and that reStructuredText makes one of; `shown`: its columns."""
    if not rows:
        return "nothing has been made yet"
    cells = [tuple(c for c, name in zip(row, HEAD, strict=True) if name in shown) for row in (HEAD, *map(_cells, rows))]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    rule = "  ".join("=" * width for width in widths)
    text = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells]
    return "\n".join([rule, text[0], rule, *text[1:], rule])


def _cells(row: Row) -> tuple[str, ...]:
    spent, saved = row.spent, row.saved
    return (
        row.stage,
        *(UNKNOWN if count is None else str(count) for count in (row.artifacts, row.made, row.found)),
        span(spent.wall_s, spent.wall_unknown),
        span(spent.cpu_s, spent.cpu_unknown),
        span(spent.gpu_s, spent.wall_unknown),
        readable(row.n_bytes),
        UNKNOWN if row.peak_memory_bytes is None else readable(row.peak_memory_bytes),
        span(saved.wall_s, saved.wall_unknown) if saved else UNKNOWN,
        span(saved.cpu_s, saved.cpu_unknown) if saved else UNKNOWN,
    )


def span(seconds: float | None, unknown: int) -> str:
    """Of so many seconds, beside that of artifacts whose time is unknown."""
    if seconds is None:
        return UNKNOWN
    unit, size = next((u, s) for u, s in (("h", 3600), ("min", 60), ("s", 1)) if seconds >= 2 * s or s == 1)
    return f"{seconds / size:.1f} {unit}" + (f" + {unknown} {UNKNOWN}" if unknown else "")
