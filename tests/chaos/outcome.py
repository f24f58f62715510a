"""How a fault ends."""

from dataclasses import dataclass

from tests.chaos.bench import Bench, Copy, Run

SURVIVED, SILENT, STUCK, REPEATED, UNNAMED = "survived", "silent", "stuck", "repeated", "unnamed"
"""Silent: other bytes, or none, without a word. Stuck: no rerun gets through. Repeated: what was whole was made again.
Unnamed: a run failed, and named neither the file nor its artifact."""


@dataclass(frozen=True)
class Outcome:
    kind: str
    verdict: str
    about: str = ""


def judge(
    kind: str,
    about: str,
    copy: Copy,
    bench: Bench,
    runs: list[Run],
    kept: dict[str, str] | None = None,
    lost: frozenset[str] = frozenset(),
    named: frozenset[str] = frozenset(),
) -> Outcome:
    """`kept`: receipts that must be as they were; `lost`: artifacts that nothing needs, which may stay away, or stay
    damaged if no receipt says that they are whole; `named`: what the message of every run that failed must hold one of,
    if there is any."""
    if runs[-1].code:
        return Outcome(kind, STUCK, f"{about}: {' | '.join(runs[-1].reasons)[:600] or runs[-1].said[-600:]}")
    found, receipts = copy.contents(), copy.receipts()
    away = {a for a in lost if not any(f"{receipt}/".startswith(f"{a}/") for receipt in receipts)}
    gone = {n for n in bench.expected if n not in found and not any(n.startswith(f"{a}/") for a in lost)}
    other = {n for n in bench.expected if n in found and found[n] != bench.expected[n]}
    other = {n for n in other if not any(n.startswith(f"{a}/") for a in away)}
    if gone or other:
        return Outcome(kind, SILENT, f"{about}: differ {sorted(other)[:4]}, gone {sorted(gone)[:4]}")
    again = [a for a, receipt in (kept or {}).items() if receipts.get(a) != receipt]
    if again:
        return Outcome(kind, REPEATED, f"{about}: {sorted(again)[:6]}")
    mute = [r for r in runs if r.code and not any(n in line for n in named for line in r.reasons)]
    if named and mute:
        return Outcome(kind, UNNAMED, f"{about}: {' | '.join(mute[0].reasons)[:400] or mute[0].said[-400:]}")
    return Outcome(kind, SURVIVED, about)
