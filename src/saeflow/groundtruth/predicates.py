"""What can be said of a position of a row: the vocabulary of automatic labels.

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
    token=x@2, count x=1@2     both of token or count, and position
"""

from typing import NamedTuple

import numpy as np

from saeflow.groundtruth.cases import Case
from saeflow.groundtruth.program import BOS, PAD, run, values_of

MOST_VALUES = 64  # of a numerical variable, for its values to be predicates
MOST_COUNT = 16


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
    program, values = case.program, run(case.program, tokens)
    found: list[tuple[str, np.ndarray, bool]] = []
    position = np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape)
    found.append(("always", np.ones(tokens.shape, dtype=bool), False))
    found += [(special, tokens == program.token_id(special), False) for special in (BOS, PAD)]
    found.append((f"not {BOS}", tokens != program.token_id(BOS), False))
    words = values_of(program.variables["tokens"])
    is_word = {word: values["tokens"] == code for code, word in enumerate(words)}
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
    flat = {name: value.ravel() for name, value in numbers.items()}
    return Predicates(names, np.stack(masks), true_values, flat)


def states(case: Case, tokens: np.ndarray, hook_name: str) -> np.ndarray:
    """(N P,) int64: which of the reachable states each position is in: a different number for each combination of the
    variables that the compiled model has at a hook, and of BOS and PAD where it has the tokens."""
    variables_at_hook = case.compiled.variables_at(hook_name)
    values = run(case.program, tokens)
    columns = [np.unique(values[name].round(9), return_inverse=True)[1].ravel() for name in variables_at_hook]
    columns += [tokens.ravel()] if "tokens" in variables_at_hook else []
    _, state = np.unique(np.stack(columns), axis=1, return_inverse=True)
    return np.asarray(state).ravel()
