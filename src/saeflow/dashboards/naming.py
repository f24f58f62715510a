"""What a dictionary is called on pages: from its table of latents and from what was measured of it."""

from typing import Any

from saeflow.dictionaries.naming import amount_name, place_name, series_name

_PARTS = {"input": "input side of a pair", "output": "output side of a pair"}


def identity(index: dict[str, Any], summary: dict[str, Any], side: str = "") -> dict[str, Any]:
    """`kind`, `place`, `reads` (where it differs), `amount` and a `title` of them; `summary` of its evaluation, or of
    its comparison with the truth, or empty; `side` of a pair (`input`, `output`)."""
    head = -1 if index["hook_head_index"] is None else int(index["hook_head_index"])
    more = bool(summary.get("skip")), summary.get("saelens"), summary.get("source") or None
    kind = series_name(index["kind"], index["activation"], *more, head)
    place, reads = place_name(index["hook_name_out"], head), place_name(index["hook_name"], head)
    part = _PARTS.get(side, "")
    amount = "" if index["amount"] is None else f"{amount_name(index['amount_name'])} = {index['amount']:g}"
    title = ", ".join(text for text in (kind, amount, part, place) if text)
    return {
        "title": title, "kind": kind, "place": place, "reads": reads if reads != place else "", "amount": amount,
        "part": part, "model": summary.get("model_name") or "",
    }  # fmt: skip
