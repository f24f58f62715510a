"""The cases: programs of InterpBench by their number there, their rows, and where a trained model is to compute what.

Numbers, vocabularies, lengths and causality are InterpBench's. Rows are all that there are where these are few, else a
seeded sample.
"""

import itertools
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from saeflow.config import ConfigError
from saeflow.groundtruth.compiler import Compiled, compile_program
from saeflow.groundtruth.program import BOS, PAD, Aggregate, Block, Linear, PairMap, Program, SelectorWidth, TokenMap

ALL_ROWS_UP_TO = 4096
LEAST_HEADS, LEAST_D_HEAD, LEAST_LAYERS = 4, 3, 2
LETTERS = tuple("abcdefghijklmnopqrstuvwxyz")
NUMBERS = tuple(range(11))


@dataclass(frozen=True)
class Case:
    """`n_ctx`, `min_length`: of a row without PAD, BOS counted. `tolerance`: within which a numerical output is right;
    half of the smallest gap between two right outputs, or InterpBench's 0.05 where these are dense."""

    number: int
    about: str
    words: tuple[Any, ...]
    blocks: tuple[Block, ...]
    n_ctx: int = 10
    min_length: int = 4
    causal: bool = True
    tolerance: float = 0.05
    heads: dict[str, int] = field(default_factory=dict)
    """Heads of the trained model that stand for attention variables; else the number that they have when compiled."""

    @cached_property
    def program(self) -> Program:
        return Program(self.words, self.n_ctx, self.causal, self.blocks, self.blocks[-1].output)

    @cached_property
    def compiled(self) -> Compiled:
        return compile_program(self.program)

    @property
    def n_rows(self) -> int:
        """Of all lengths, how many rows there are."""
        return sum(len(self.words) ** (length - 1) for length in range(self.min_length, self.n_ctx + 1))

    def rows(self, n: int | None = None, seed: int = 0) -> np.ndarray:
        """Token ids (N, n_ctx) int64: the first `n` of all rows, shortest first and counting in base `words`; or, where
        there are more than `ALL_ROWS_UP_TO`, `n` different ones drawn by length and then by word."""
        if self.n_rows <= ALL_ROWS_UP_TO:
            return self._all_rows()[:n]
        if n is None:
            raise ConfigError(f"case {self.number} has {self.n_rows:,} rows: say how many are wanted")
        if n > self.n_rows // 2:
            raise ConfigError(f"case {self.number} has {self.n_rows:,} rows; draw at most half of them, not {n:,}")
        rng = np.random.default_rng(seed)
        found: dict[bytes, np.ndarray] = {}
        while len(found) < n:
            length = int(rng.integers(self.min_length, self.n_ctx + 1))
            row = self._row(rng.integers(0, len(self.words), length - 1))
            found.setdefault(row.tobytes(), row)
        return np.stack(list(found.values()))

    def _all_rows(self) -> np.ndarray:
        lengths = range(self.min_length - 1, self.n_ctx)
        words = (w for n in lengths for w in itertools.product(range(len(self.words)), repeat=n))
        return np.stack([self._row(np.array(w)) for w in words])

    def _row(self, words: np.ndarray) -> np.ndarray:
        program = self.program
        row = np.full(self.n_ctx, program.token_id(PAD))
        row[0] = program.token_id(BOS)
        ids = np.array([program.token_id(word) for word in program.variables["tokens"].values or ()])
        row[1 : 1 + len(words)] = ids[words]
        return row

    def labels(self, tokens: np.ndarray) -> np.ndarray:
        """What the program says on rows (N, P): codes (-1: none) or numbers; see `saeflow.groundtruth.program`."""
        return self.program.run(tokens)[self.program.output]


def small_config(case: Case) -> dict[str, Any]:
    """Of the model to be trained: InterpBench's rule (heads of half the compiled size, gelu), but no head below 3."""
    c = case.compiled.config
    n_heads, d_head = max(LEAST_HEADS, c["n_heads"]), max(LEAST_D_HEAD, c["d_head"] // 2)
    sizes = {"n_layers": max(LEAST_LAYERS, c["n_layers"]), "n_heads": n_heads, "d_head": d_head}
    return c | sizes | {"d_model": n_heads * d_head, "d_mlp": 4 * n_heads * d_head, "act_fn": "gelu"}


def get_case(number: int) -> Case:
    """Raises `ConfigError` for a case that is not built here."""
    if number not in CASES:
        raise ConfigError(f"there is no case {number}; these are: {', '.join(map(str, CASES))}")
    return CASES[number]


def _fraction(name: str, boolean: str) -> Aggregate:
    """The mean of a variable over all positions up to here."""
    return Aggregate(name, "indices", "indices", boolean, lambda k, q: k <= q)


def _shift(name: str, value: str, offset: int) -> Aggregate:
    return Aggregate(name, "indices", "indices", value, lambda k, q: q == k + offset)


def _running_fraction_of_x() -> tuple[Block, ...]:
    return (TokenMap("is_x", "tokens", lambda t: t == "x", numerical=True), _fraction("frac_prevs", "is_x"))


def _trend(here: int, after: int) -> str:
    return "increasing" if here < after else "decreasing" if here > after else "constant"


CASES = {
    case.number: case
    for case in (
        Case(
            3,
            "fraction of x up to here",
            ("a", "b", "c", "x"),
            _running_fraction_of_x(),
            n_ctx=5,
            tolerance=0.0416,  # half of 1/12
            heads={"frac_prevs": 2},
        ),
        Case(
            4,
            "fraction of ( minus fraction of ) up to here",
            ("a", "b", "c", "(", ")"),
            (
                TokenMap("is_open", "tokens", lambda t: t == "(", numerical=True),
                TokenMap("is_close", "tokens", lambda t: t == ")", numerical=True),
                _fraction("opens", "is_open"),
                _fraction("closes", "is_close"),
                Linear("balance", "opens", "closes", (1.0, -1.0)),
            ),
        ),
        Case(
            12,
            "does abc end here?",
            ("a", "b", "c"),
            (
                TokenMap("is_a", "tokens", lambda t: t == "a"),
                TokenMap("is_b", "tokens", lambda t: t == "b"),
                TokenMap("is_c", "tokens", lambda t: t == "c"),
                _shift("a_two_ago", "is_a", 2),
                _shift("b_one_ago", "is_b", 1),
                PairMap("ab_before", "a_two_ago", "b_one_ago", lambda x, y: x and y),
                PairMap("abc", "ab_before", "is_c", lambda x, y: x and y),
            ),
            n_ctx=15,
        ),
        Case(
            13,
            "is the next number larger, smaller or equal?",
            (0, 1, 2),
            (_shift("next", "tokens", -1), PairMap("trend", "tokens", "next", _trend)),
            causal=False,
        ),
        Case(
            14,
            "how many a are in the row?",
            ("a", "b", "c"),
            (SelectorWidth("count", "tokens", "tokens", lambda k, q: k == "a"),),
            causal=False,
        ),
        Case(39, "fraction of x up to here, 26 letters and 59 positions", LETTERS, _running_fraction_of_x(), n_ctx=60),
        Case(
            42,
            "the first element, everywhere",
            LETTERS[:10],
            (
                TokenMap("zero", "indices", lambda i: 0),
                Aggregate("first", "zero", "indices", "tokens", lambda k, q: k == q),
            ),
        ),
        Case(60, "plus one", NUMBERS, (TokenMap("increment", "tokens", lambda t: t + 1),)),
        Case(
            87,
            "is it 3 or more?",
            NUMBERS,
            (
                TokenMap("at_least_3", "tokens", lambda t: t >= 3),
                TokenMap("binary", "at_least_3", lambda t: 1 if t else 0),
            ),
        ),
    )
}
