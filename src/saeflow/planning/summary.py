"""What `snakemake --summary` prints: a line for the receipt of every artifact, in Snakemake's columns."""

import time
from collections.abc import Collection
from pathlib import Path

from saeflow.planning.graph import Plan


def summary(plan: Plan, forced: Collection[str] = (), detailed: bool = False) -> str:
    """`forced`: stages of which all artifacts are made again."""
    names = ["output_file", "date", "rule", "log-file(s)", *["input-file(s)", "shellcmd"] * detailed, "status", "plan"]
    rows = [names]
    for stage, table in plan.stages.items():
        found, making = set(plan.found[stage]), set(table if stage in forced else plan.to_make[stage])
        for key, instance in table.items():
            receipt, log = plan.receipt(stage, key), f"logs/{stage}/{plan.leaders.get((stage, key), key)}.log"
            date = time.ctime(Path(receipt).stat().st_mtime) if key in found else "-"
            row = [receipt, date, stage, log if Path(log).is_file() else "-"]
            if detailed:
                row += [",".join(plan.receipt(s, k) for s, keys in instance.needs.items() for k in keys) or "-", "-"]
            rows.append([*row, "ok" if key in found else "missing", "update pending" if key in making else "no update"])
    return "\n".join("\t".join(row) for row in rows)
