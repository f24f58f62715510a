"""Automatic labels: for each live latent of a dictionary, the predicate that it matches best, what it follows, and the
contexts in which it is most active, as tables and as a page that needs nothing but itself.

Predicates are true or false at every position; numbers are a value at every position. A predicate that says what an
earlier one says (the same positions), or holds nowhere, is left out, so the plainest name of a set stays. In order:

    always                     everywhere
    BOS, PAD, not BOS          the special tokens
    token=x                    the word here
    position=2                 the place, BOS at 0
    variable=value             a variable of the program; a numerical one by its distinct values, if they are few
    some x, no x, all x        among the words up to here
    count x=2                  among the words up to here
    first x, first not x       here and not before; anything else here, but only x before
    before=x, token=x before=y  the word before this one, alone and with the word here
    token=x@2, count x=1@2     both of token or count, and position

A latent *fires* where its activation is above 0. Against a predicate it has a precision (share of where it fires that
the predicate holds), a recall (share of where the predicate holds that it fires), their harmonic mean F1, and an AUROC:
the chance that its activation is larger at a position where the predicate holds than at one where it does not, ties
counted half. The label is the predicate of the largest F1, then AUROC, then the plainest. `f1_chance` is the same
largest F1 when the latent's activations are put at other positions at random: what a latent that knows nothing gets.

A latent that fires in two states of the program, such as x@2 and x@4, has no predicate that fits: the one or two states
that fit best stand beside its label (`two_states`).
"""

import html
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy.stats import rankdata

from saeflow.groundtruth.cases import Case
from saeflow.groundtruth.program import BOS, PAD, values_of

MOST_VALUES = 64  # of a numerical variable, for its values to be predicates
MOST_COUNT = 16
TIE, LEAK = 1e-9, 1e-6
LEAST_POSITIONS = 20  # of a predicate, for its AUROC to mean anything
TOP = 20  # contexts of a latent


class Predicates(NamedTuple):
    """Of N rows of P positions, flattened: M = N P."""

    names: tuple[str, ...]
    masks: np.ndarray
    """(predicates, M) bool."""
    true_values: tuple[bool, ...]
    """Whether the predicate is the value of one variable of the program, `tokens` and `indices` included."""
    numbers: dict[str, np.ndarray]
    """By name, (M,) float64: numerical variables, and `position`."""


def predicates(case: Case, tokens: np.ndarray) -> Predicates:
    """Of rows `tokens` (N, P) of token ids."""
    program, values = case.program, case.program.run(tokens)
    position = np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape)
    found = [("always", np.ones(tokens.shape, dtype=bool), False)]
    found += [(special, tokens == program.token_id(special), False) for special in (BOS, PAD)]
    found.append((f"not {BOS}", tokens != program.token_id(BOS), False))
    is_word = {w: values["tokens"] == code for code, w in enumerate(values_of(program.variables["tokens"]))}
    found += [(f"token={word}", mask, True) for word, mask in is_word.items()]
    found += [(f"position={p}", position == p, True) for p in range(1, tokens.shape[1])]
    numbers = {"position": position.astype(np.float64)}
    for name, variable in program.variables.items():
        if variable.values is not None:
            if name not in ("tokens", "indices"):
                found += [(f"{name}={v}", values[name] == code, True) for code, v in enumerate(variable.values)]
            continue
        numbers[name] = values[name]
        distinct = np.unique(values[name].round(9))
        if len(distinct) <= MOST_VALUES:
            found += [(f"{name}={v:.3g}", np.isclose(values[name], v, rtol=0, atol=1e-8), True) for v in distinct]
    counts = {word: mask.cumsum(1) for word, mask in is_word.items()}
    after_bos = position > 0
    for word, count in counts.items():
        here = is_word[word]
        found += [
            (f"some {word}", count > 0, False),
            (f"no {word}", (count == 0) & after_bos, False),
            (f"all {word}", (count == position) & after_bos, False),
            (f"first {word}", here & (count == 1), False),
            (f"first not {word}", ~here & (count == position - 1) & after_bos, False),
        ]
    before = {word: np.pad(mask[:, :-1], ((0, 0), (1, 0))) for word, mask in is_word.items()}
    found += [(f"before={word}", mask, False) for word, mask in before.items()]
    found += [(f"token={w} before={b}", is_word[w] & before[b], False) for w in is_word for b in before]
    most = min(MOST_COUNT, tokens.shape[1] - 1)
    found += [(f"count {w}={c}", (n == c) & after_bos, False) for w, n in counts.items() for c in range(1, most + 1)]
    places = range(1, tokens.shape[1])
    for word, mask in {**is_word, PAD: tokens == program.token_id(PAD)}.items():
        found += [(f"token={word}@{p}", mask & (position == p), False) for p in places]
    for word, count in counts.items():
        found += [
            (f"count {word}={c}@{p}", (count == c) & (position == p), False)
            for p in places
            for c in range(min(p, MOST_COUNT) + 1)
        ]
    kept: dict[bytes, tuple[str, np.ndarray, bool]] = {}
    for name, mask, true_value in found:
        if mask.any():
            kept.setdefault(np.packbits(mask).tobytes(), (name, mask.ravel(), true_value))
    names, masks, true_values = zip(*kept.values(), strict=True)
    return Predicates(names, np.stack(masks), true_values, {name: value.ravel() for name, value in numbers.items()})


def states(case: Case, tokens: np.ndarray, hook_name: str) -> np.ndarray:
    """(N P,) int64: which of the reachable states each position is in: a different number for each combination of the
    variables that the compiled model has at a hook, and of BOS and PAD where it has the tokens."""
    variables_at_hook = case.compiled.variables_at(hook_name)
    values = case.program.run(tokens)
    columns = [np.unique(values[name].round(9), return_inverse=True)[1].ravel() for name in variables_at_hook]
    columns += [tokens.ravel()] if "tokens" in variables_at_hook else []
    _, state = np.unique(np.stack(columns), axis=1, return_inverse=True)
    return np.asarray(state).ravel()


# -------------------------------------------------------------------- labels
def without_leaks(activations: np.ndarray) -> np.ndarray:
    """(M, n), with 0 for what is below a millionth of the latent's largest activation: what a softmax leaves of what is
    not selected is no firing."""
    return np.where(activations > LEAK * activations.max(0, initial=0), activations, 0.0)


class Matches(NamedTuple):
    """Of every live latent (rows) with every predicate (columns)."""

    live: np.ndarray
    """(L,): which latents fire anywhere."""
    precision: np.ndarray
    recall: np.ndarray
    f1: np.ndarray
    auroc: np.ndarray
    """NaN for a predicate that holds everywhere."""


def match(activations: np.ndarray, against: Predicates) -> Matches:
    """`activations` (M, n), at the positions of `against`; 0 or more."""
    live = np.flatnonzero((activations > 0).any(0))
    live_activations = activations[:, live].T  # (L, M)
    masks = against.masks.astype(np.float64).T  # (M, predicates)
    fires = (live_activations > 0).astype(np.float64)
    both = fires @ masks
    n_fires, n_true = fires.sum(1)[:, None], masks.sum(0)[None]
    n_false = masks.shape[0] - n_true
    with np.errstate(invalid="ignore"):
        auroc = (rankdata(live_activations, axis=1) @ masks - n_true * (n_true + 1) / 2) / np.where(
            n_false > 0, n_true * n_false, np.nan
        )
    return Matches(live, both / np.maximum(n_fires, 1), both / n_true, 2 * both / (n_fires + n_true), auroc)


def label(activations: np.ndarray, against: Predicates, seed: int = 0) -> pd.DataFrame:
    """A row a live latent: `latent`, `frequency`, `max` and `mean` of its activations where it fires, `label`,
    `precision`, `recall`, `f1`, `auroc`, `f1_chance`, the predicate of the largest AUROC, and `r2_<number>` with every
    number."""
    found = match(activations, against)
    names = np.array(against.names)
    live = activations[:, found.live]
    table = {"latent": found.live, "frequency": (live > 0).mean(0), "max": live.max(0, initial=0)}
    table["mean"] = live.sum(0) / np.maximum((live > 0).sum(0), 1)
    best = _best(found.f1, np.nan_to_num(found.auroc, nan=0.5))
    rows = np.arange(len(found.live))
    often = against.masks.sum(1) >= LEAST_POSITIONS
    by_auroc = _best(np.where(often, np.nan_to_num(found.auroc, nan=0.0), -1.0), found.f1)
    chance = match(activations[np.random.default_rng(seed).permutation(len(activations))], against).f1
    table |= {
        "label": names[best],
        **{name: getattr(found, name)[rows, best] for name in ("precision", "recall", "f1", "auroc")},
        "f1_chance": chance.max(1) if len(rows) else np.zeros(0),
        "label_by_auroc": names[by_auroc],
        "best_auroc": found.auroc[rows, by_auroc],
    }
    for name, value in against.numbers.items():
        table[f"r2_{name}"] = correlation(activations[:, found.live], value) ** 2
    return pd.DataFrame(table)


def two_states(activations: np.ndarray, states: np.ndarray, names: list[str], seed: int = 0) -> pd.DataFrame:
    """A row for each live latent of `activations` (M, n): the one or two of the `states` (M,) whose union has the
    largest F1 with where it fires (`states`, by their `names`), that F1 (`f1_states`), and the largest when the
    activations are put at other positions at random (`f1_states_chance`)."""
    live = np.flatnonzero((activations > 0).any(0))
    fires = activations[:, live] > 0
    (best, f1), (_, chance) = (
        _best_union(some, states) for some in (fires, fires[np.random.default_rng(seed).permutation(len(fires))])
    )
    said = [" or ".join(dict.fromkeys(names[s] for s in pair)) for pair in best]
    return pd.DataFrame({"latent": live, "states": said, "f1_states": f1, "f1_states_chance": chance})


def _best_union(fires: np.ndarray, states: np.ndarray) -> tuple[list[tuple[int, int]], np.ndarray]:
    """Of every column of `fires` (M, L) the pair of states of largest F1, one state as a pair with itself, and its F1.
    States are apart, so that the counts of a union are sums."""
    sizes = np.bincount(states)
    same, found, values = np.diag_indices(len(sizes)), [], []
    for column in fires.T:
        both = np.bincount(states[column], minlength=len(sizes))
        f1 = 2 * (both[:, None] + both) / (column.sum() + sizes[:, None] + sizes)
        f1[same] = 2 * both / (column.sum() + sizes)
        place = int((f1 - TIE * (1 - np.eye(len(sizes)))).argmax())  # of equal ones a state alone
        pair = divmod(place, len(sizes))
        found.append((min(pair), max(pair)))
        values.append(f1[pair])
    return found, np.array(values)


def correlation(activations: np.ndarray, number: np.ndarray) -> np.ndarray:
    """Pearson's, of every column of `activations` (M, L) with `number` (M,); 0 where either does not vary."""
    a, b = activations - activations.mean(0), number - number.mean()
    size = np.sqrt((a * a).sum(0) * (b @ b))
    return np.divide(a.T @ b, size, out=np.zeros(a.shape[1]), where=size > 1e-12)


def _best(first: np.ndarray, then: np.ndarray) -> np.ndarray:
    """Column of the largest `first` of every row; among equals of the largest `then`; among those the leftmost."""
    if not len(first):
        return np.zeros(0, dtype=np.int64)
    largest = first >= first.max(1, keepdims=True) - TIE
    return np.asarray(np.where(largest, then.round(9), -np.inf).argmax(1))


# -------------------------------------------------------------------- contexts
def top_contexts(case: Case, tokens: np.ndarray, activations: np.ndarray, top: int = TOP) -> pd.DataFrame:
    """Of rows `tokens` (N, P) and `activations` (N P, n): for each live latent up to `top` rows with `latent`, `rank`,
    `row`, `position`, `token`, `context` and `activation`, the most active first, equal ones in the rows' order."""
    words = [str(word) for word in case.program.vocabulary]
    contexts = [" ".join(words[i] for i in row) for row in tokens]
    found = []
    for latent in np.flatnonzero((activations > 0).any(0)):
        for rank, place in enumerate(np.argsort(-activations[:, latent], kind="stable")[:top]):
            row, position = divmod(int(place), tokens.shape[1])
            token, activation = words[tokens[row, position]], activations[place, latent]
            if activation > 0:
                found.append((latent, rank, row, position, token, contexts[row], activation))
    return pd.DataFrame(found, columns=["latent", "rank", "row", "position", "token", "context", "activation"])


def page(title: str, labels: pd.DataFrame, contexts: pd.DataFrame) -> str:
    """Static HTML: a table of all latents with their labels, then each one's contexts, its own token marked."""
    head = "".join(f"<th>{html.escape(name)}</th>" for name in labels.columns)
    body = []
    for row in labels.to_dict("records"):
        shown = (f"{v:.3f}" if isinstance(v, float) else html.escape(str(v)) for v in row.values())
        cells = "".join(f"<td>{value}</td>" for value in shown)
        body.append(f'<tr id="row{row["latent"]}">{cells}</tr>')
    parts = [f"<table><tr>{head}</tr>{''.join(body)}</table>"]
    for latent, rows in contexts.groupby("latent"):
        label = labels.loc[labels["latent"] == latent, "label"]
        parts.append(f"<h2 id=latent{latent}>latent {latent}: {html.escape(str(label.iloc[0]))}</h2><table>")
        parts.append("<tr><th>activation</th><th>position</th><th>context</th></tr>")
        for position, context, activation in zip(rows["position"], rows["context"], rows["activation"], strict=True):
            words = [html.escape(word) for word in context.split(" ")]
            words[position] = f"<b>{words[position]}</b>"
            parts.append(f"<tr><td>{activation:.3f}</td><td>{position}</td><td>{' '.join(words)}</td></tr>")
        parts.append("</table>")
    style = "body{font:14px sans-serif;margin:2em}td,th{padding:1px 10px;text-align:left}b{background:#fe9}"
    return (
        f'<!doctype html><meta charset="utf-8"><title>{html.escape(title)}</title><style>{style}</style>'
        f"<h1>{html.escape(title)}</h1>{''.join(parts)}\n"
    )
