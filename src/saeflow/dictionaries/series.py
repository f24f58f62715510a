"""What the dictionaries of an experiment are called, in every figure and table: by what differs between their settings.

* `place`: where numbers may be compared and levels are shared: the language model, the held-out tokens (and how they
  are evaluated), the hook and the head. A panel shows one.
* `series`: what is equal in all but its seeds and its amount (k, the L1 coefficient, ...): the kind, and whatever else
  the experiment varies. A line joins one.
* `point`: what of a series differs in its seeds alone. It is drawn as mean and range.
* `label`: of one dictionary at its place: series, amount, and the seeds where they vary.

What was made elsewhere is a series by what its files say of it; where they don't say its amount, by its
`dictionary.label`, each a point of its own: dictionaries that the user gives one label are one series.
"""

import re
from collections.abc import Hashable, Mapping
from typing import Any

import numpy as np
import pandas as pd

from saeflow.dictionaries.naming import SERIES, amount_name, hook_title, place_name, series_name
from saeflow.dictionaries.settings import Settings, by_one_width, differing, phrase, same, tell_apart
from saeflow.planning.digests import short_hash

IDENTITY = ["place", "hook_name", "hook_name_out", "series", "amount_name", "amount", "seed"]
"""The first columns of a table of dictionaries; the key follows."""
CONTROLS = {"none": "trained model", "reinit": "re-initialised model", "permuted": "permuted model"}
SEEDS = ("seed", "training.shuffle_seed")
"""What makes no series: draws of the same settings."""
_WIDTH = ("dictionary.expansion", "dictionary.d_sae", "d_sae")
_OF_PLACE = re.compile(r"(model|corpus|tokens|tracr|evaluation)\..*|tokenizer")
NAMES = ("model.name", "corpus.name")
"""What people call things: it says which is which, but tells nothing apart."""
_SAID_BY_KIND = ("dictionary.saelens", "dictionary.skip", "dictionary.content", "dictionary.release")


def control(summary: Mapping[Any, Any]) -> str:
    """Name of the language model by a summary's `randomise`: trained, or which control."""
    return CONTROLS[summary.get("randomise") or "none"]


def with_names(table: pd.DataFrame, along: str = "amount") -> pd.DataFrame:
    """A table of dictionaries (rows of summaries) in the order in which figures show them, with `head` (-1: all),
    `where` (hook and head), `place`, `series`, `point`, `repeat` (the seeds) and `label`; amounts are named for people.

    Its column `settings` (`saeflow.dictionaries.settings.settings` of each row), where it has one, is what they are
    told apart by, and is dropped; else what the summaries say. `along`: what the lines follow, `amount`, or `d_sae`:
    then series differ in their amounts, and the width makes none.
    """
    rows: list[dict[Hashable, Any]] = table.to_dict("records")
    held: list[Settings] = list(table["settings"]) if "settings" in table else [{}] * len(rows)
    head = [-1 if _missing(row.get("hook_head_index")) else int(row["hook_head_index"]) for row in rows]
    where = [place_name(str(row["hook_name_out"]), h) for row, h in zip(rows, head, strict=True)]
    places = _places(rows, held, where)
    kinds = [_kind(row, h) for row, h in zip(rows, head, strict=True)]
    series = _series(rows, held, kinds, places, along)
    repeats = [{p: value for p in SEEDS if not _missing(value := s.get(p, row.get(p)))}
               for s, row in zip(held, rows, strict=True)]  # fmt: skip
    varying = differing(repeats)
    amounts = [amount_name(str(row["amount_name"])) for row in rows]
    labels = []
    for row, name, amount, repeat in zip(rows, series, amounts, repeats, strict=True):
        at = [] if _missing(row["amount"]) or along != "amount" else [f"{amount} = {row['amount']:g}"]
        seeds = [phrase(p, v).replace("seed = ", "seed ") for p, v in repeat.items() if p in varying]
        labels.append(", ".join([name, *at, *seeds]))
    named = table.drop(columns="settings", errors="ignore").assign(
        head=head, where=where, place=places, series=series, amount_name=amounts, label=labels,
        point=[_point(row, along) for row in rows], repeat=[same(repeat) for repeat in repeats],
    )  # fmt: skip
    return named.iloc[_order(named, kinds)].reset_index(drop=True)


def ordered_series(table: pd.DataFrame) -> list[str]:
    """The series that a named table has, in the order in which figures number them: that of the kinds, then of names.

    A figure numbers those that it shows and no others, so that none looks like another.
    """
    return sorted(table["series"].unique(), key=lambda name: (_rank(name), natural(name)))


# -------------------------------------------------------------------- series
def _kind(row: dict[Hashable, Any], head: int) -> str:
    kind, activation, skip, saelens = (row[n] for n in ("kind", "activation", "skip", "saelens"))
    source = row.get("source")
    name = series_name(kind, activation, bool(skip), saelens, None if _missing(source) else source, head)
    return name if _missing(row.get("jacobian_coefficient")) else f"{name} of a Jacobian pair"


def _series(
    rows: list[dict[Hashable, Any]], held: list[Settings], kinds: list[str], places: list[str], along: str
) -> list[str]:
    own = [_own(row, s, along) for row, s in zip(rows, held, strict=True)]
    names = list(kinds)
    for kind in dict.fromkeys(kinds):
        mine = [i for i, name in enumerate(kinds) if name == kind]
        for i, said in zip(mine, tell_apart(by_one_width([own[i] for i in mine])), strict=True):
            names[i] = ", ".join([kind, *said])
    # What no setting tells apart is still not joined: each gets its label, or its key.
    taken: dict[Any, list[int]] = {}
    for i, row in enumerate(rows):
        seeds = [held[i].get(p, row.get(p)) for p in SEEDS]
        taken.setdefault((places[i], names[i], _point(row, along), str(seeds)), []).append(i)
    for group in taken.values():
        keys = {i: str(rows[i].get("dictionary_key", i)) for i in group}
        for i, key in keys.items() if len(set(keys.values())) > 1 else ():
            names[i] += f", {held[i].get('dictionary.label') or key}"
    return names


def _own(row: dict[Hashable, Any], held: Settings, along: str) -> dict[str, Any]:
    """Settings that make a dictionary another series than another of its kind."""
    amount = str(row["amount_name"])
    skipped = {*SEEDS, *_SAID_BY_KIND, "dictionary.sae_id", "dictionary.label"}
    skipped |= {f"dictionary.{amount}", f"dictionary.options.{amount}"}
    own = {"d_sae": row.get("d_sae")} | {name: value for name, value in _said_by_summary(row).items() if value}
    own |= {path: value for path, value in held.items() if path not in skipped and not _OF_PLACE.fullmatch(path)}
    own |= {"tokens.train_tokens": held["tokens.train_tokens"]} if "tokens.train_tokens" in held else {}
    if along != "amount":
        own = {path: value for path, value in own.items() if path not in _WIDTH}
        own |= {} if _missing(row["amount"]) else {f"dictionary.{amount}": row["amount"]}
    elif _missing(row["amount"]) and "dictionary.label" in held:
        own["dictionary.label"] = held["dictionary.label"]
    return {path: value for path, value in own.items() if path != "d_sae" or not _missing(value)}


def _said_by_summary(row: dict[Hashable, Any]) -> dict[str, Any]:
    names = ("sparsity", "jacobian_coefficient")
    own = {f"dictionary.{name}": row[name] for name in names if not _missing(row.get(name))}
    reads, writes = str(row["hook_name"]), str(row["hook_name_out"])
    if reads != writes:  # of the same layer goes without saying
        title, layer = hook_title(reads), hook_title(writes).split(", ")[0]
        own["reads"] = title.removeprefix(f"{layer}, ")
    return own


def _point(row: dict[Hashable, Any], along: str) -> str:
    """Dictionaries of one series that differ in their seeds alone have the same; of an unknown amount, none has."""
    value = row[along]
    return str(row.get("dictionary_key", "")) if _missing(value) else f"{value:g}"


# -------------------------------------------------------------------- places
def _places(rows: list[dict[Hashable, Any]], held: list[Settings], where: list[str]) -> list[str]:
    found, models = [], dict[Any, str]()
    for row, s in zip(rows, held, strict=True):  # what was made elsewhere may not know what its model is called here
        models.setdefault(s.get("model.weights"), "")
        name = s.get("model.name") or row.get("model_name") or ""
        models[s.get("model.weights")] = models[s.get("model.weights")] or str(name)
    for row, s in zip(rows, held, strict=True):
        about = about_place(s, models[s.get("model.weights")])
        found.append((about, same([s_of_place(s), row.get("tokens_key"), row.get("model_key")])))
    distinct = {exact: about for about, exact in found}
    told = dict(zip(distinct, tell_apart(list(distinct.values())), strict=True))
    titles = [", ".join([at, *told[exact]]) for at, (_, exact) in zip(where, found, strict=True)]
    meant: dict[str, dict[str, None]] = {}
    for title, (_, exact) in zip(titles, found, strict=True):
        meant.setdefault(title, {})[exact] = None
    return [
        title if len(meant[title]) == 1 else f"{title}, {short_hash(exact)}"
        for title, (_, exact) in zip(titles, found, strict=True)
    ]


def s_of_place(held: Settings) -> dict[str, Any]:
    """The settings that make a place: of the model, the held-out tokens, and the evaluation."""
    apart = ("tokens.train_tokens", *NAMES)
    return {p: v for p, v in held.items() if _OF_PLACE.fullmatch(p) and p not in apart}


def about_place(held: Settings, model: str) -> dict[str, Any]:
    """What people call the model and the tokens of a place, in the order in which it is said."""
    control = held.get("model.randomise") or "none"
    own = {"model": model, "control": CONTROLS[control]}
    if control != "none":
        own["control_seed"] = held["model.randomise_seed"]
    own |= {"corpus": f"on {held['corpus.name']}"} if held.get("corpus.name") else {}
    content = re.compile(r"model\.(weights|bridge|randomise.*)|corpus\..*|tokenizer")  # of these, hashes
    return own | {path: value for path, value in s_of_place(held).items() if not content.fullmatch(path)}


# -------------------------------------------------------------------- order
def _order(named: pd.DataFrame, kinds: list[str]) -> list[int]:
    """Rows by hook in the order of the layers, then trained models before their controls, then by series and amount."""
    controls = [name for control, name in CONTROLS.items() if control != "none"]
    keys = [
        (
            natural(str(row["hook_name_out"])), row["head"], any(control in row["place"] for control in controls),
            natural(row["place"]), _rank(kind), natural(row["series"]),
            np.inf if _missing(row["amount"]) else row["amount"], row["repeat"], str(row.get("dictionary_key", "")), i,
        )
        for i, (row, kind) in enumerate(zip(named.to_dict("records"), kinds, strict=True))
    ]  # fmt: skip
    return [key[-1] for key in sorted(keys)]


def _rank(name: str) -> int:
    """Of a kind in the order of kinds; what is not of the order follows."""
    found = [n for n, known in enumerate(SERIES) if name == known or name.startswith((f"{known},", f"{known} of "))]
    return min(found, default=len(SERIES))


def natural(text: str) -> list[tuple[int, float, str]]:
    """A key to sort by: numbers in a text by their value: layer 10 after layer 9."""
    parts = re.split(r"(\d+(?:\.\d+)?)", text)
    return [(0, float(part), "") if n % 2 else (1, 0.0, part) for n, part in enumerate(parts)]


def _missing(value: Any) -> bool:
    return value is None or (isinstance(value, float) and np.isnan(value))
