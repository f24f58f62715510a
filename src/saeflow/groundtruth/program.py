"""Programs over rows of tokens, made of the five block types of Tracr's cases, and the value of every variable on rows.

A row is BOS, words, and PAD up to `n_ctx`. A variable is *categorical* (one of a few values, or none) or *numerical* at
each position. Two are there from the start: `tokens` has no value at BOS and PAD, `indices` counts the positions after
BOS from 0. Each block makes one more. What is none takes part in nothing: a map of none is none, and a selector neither
selects it nor selects for it.

`Program.run` is the definition of every block, and gives what the compiled model has, at every position, BOS and PAD
included. Arrays: N rows, P positions. Categorical variables are codes, (N, P) int64 into `Variable.values`, -1 for
none; numerical ones (N, P) float64, 0 where there is nothing.
"""

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

import numpy as np

from saeflow.config import ConfigError

BOS, PAD = "BOS", "PAD"
NONE = -1


class ProgramError(ConfigError):
    """A program that has no meaning, or none that can be compiled; the message names the block."""


@dataclass(frozen=True)
class Variable:
    name: str
    values: tuple[Any, ...] | None
    """In order; None for a numerical variable."""

    @property
    def numerical(self) -> bool:
        return self.values is None


@dataclass(frozen=True)
class Block:
    output: str

    @property
    def inputs(self) -> tuple[str, ...]:
        """The variables that it reads: its other fields that are names."""
        values = [getattr(self, field.name) for field in fields(self)[1:]]
        return tuple(value for value in values if isinstance(value, str))


@dataclass(frozen=True)
class TokenMap(Block):
    """function(input): categorical to categorical, or to a number of 0 or more."""

    input: str
    function: Callable[[Any], Any]
    numerical: bool = False


@dataclass(frozen=True)
class PairMap(Block):
    """function(first, second) of two categorical variables; RASP's SequenceMap."""

    first: str
    second: str
    function: Callable[[Any, Any], Any]


@dataclass(frozen=True)
class Aggregate(Block):
    """The mean of `value` over the positions that are selected: those where predicate(key there, query here).

    Of a categorical variable at most one position may be selected.
    """

    query: str
    key: str
    value: str
    predicate: Callable[[Any, Any], bool]


@dataclass(frozen=True)
class SelectorWidth(Block):
    """How many positions are selected; categorical."""

    query: str
    key: str
    predicate: Callable[[Any, Any], bool]


@dataclass(frozen=True)
class Linear(Block):
    """factors[0] * first + factors[1] * second, all numerical."""

    first: str
    second: str
    factors: tuple[float, float]


@dataclass(frozen=True)
class Program:
    """`words`: the vocabulary without BOS and PAD. `causal`: whether a position sees only those up to itself."""

    words: tuple[Any, ...]
    n_ctx: int
    causal: bool
    blocks: tuple[Block, ...]
    """In an order in which each reads what is there."""
    output: str

    @cached_property
    def vocabulary(self) -> tuple[Any, ...]:
        """Words, BOS and PAD by token id: numbers first, then names in ASCII order, as Tracr sorts them."""
        return tuple(sorted((*self.words, BOS, PAD), key=_order))

    def token_id(self, word: Any) -> int:
        return self.vocabulary.index(word)

    @cached_property
    def variables(self) -> dict[str, Variable]:
        """All of them, in the order in which they are made."""
        found = {
            "tokens": Variable("tokens", tuple(sorted(self.words, key=_order))),
            "indices": Variable("indices", tuple(range(self.n_ctx - 1))),
        }
        for block in self.blocks:
            for name in block.inputs:
                if name not in found:
                    raise ProgramError(f"block {block.output!r} reads {name!r}, which no block before it makes")
            if block.output in found:
                raise ProgramError(f"two variables are called {block.output!r}")
            found[block.output] = _inferred(block, found, self.n_ctx)
        if self.output not in found:
            raise ProgramError(f"the output {self.output!r} is no variable; there are: {', '.join(found)}")
        return found

    @property
    def output_variable(self) -> Variable:
        return self.variables[self.output]

    def run(self, tokens: np.ndarray, given: Mapping[str, np.ndarray] | None = None) -> dict[str, np.ndarray]:
        """Value of every variable on `tokens` (N, P) of token ids; `given` replaces some of them."""
        given = given or {}
        words = np.array([_code(self.variables["tokens"], word) for word in self.vocabulary])
        positions = np.broadcast_to(np.arange(tokens.shape[1]) - 1, tokens.shape)
        values: dict[str, np.ndarray] = {"tokens": words[tokens], "indices": np.ascontiguousarray(positions)}
        values |= {name: given[name] for name in ("tokens", "indices") if name in given}
        is_bos = tokens == self.token_id(BOS)
        for block in self.blocks:
            values[block.output] = given[block.output] if block.output in given else _value(block, self, values, is_bos)
        return values


def _value(block: Block, program: Program, values: dict[str, np.ndarray], is_bos: np.ndarray) -> np.ndarray:
    variables = program.variables
    if isinstance(block, TokenMap):
        return map_table(block, variables)[values[block.input]]
    if isinstance(block, PairMap):
        return pair_table(block, variables)[values[block.first], values[block.second]]
    if isinstance(block, Linear):
        return block.factors[0] * values[block.first] + block.factors[1] * values[block.second]
    assert isinstance(block, Aggregate | SelectorWidth)
    table = selector_table(block, variables)
    selected = table[values[block.query][:, :, None], values[block.key][:, None, :]]  # (N, query, key)
    if program.causal:
        selected &= np.tri(selected.shape[1], dtype=bool)
    width = selected.sum(2)
    if isinstance(block, SelectorWidth):
        return np.where(is_bos, NONE, width)
    to_average = values[block.value]
    if variables[block.value].numerical:
        return np.einsum("nqk,nk->nq", selected.astype(float), to_average) / np.maximum(width, 1)
    if width.max(initial=0) > 1:
        raise ProgramError(f"block {block.output!r} averages a categorical variable over several positions")
    return np.where(width == 1, np.take_along_axis(to_average, selected.argmax(2), 1), NONE)


def map_table(block: TokenMap, variables: Mapping[str, Variable]) -> np.ndarray:
    """(values + 1,): the result for every code, the last for none."""
    results = [block.function(value) for value in values_of(variables[block.input])]
    to = variables[block.output]
    if to.numerical:
        return np.array([*results, 0.0], dtype=np.float64)
    return np.array([*(_code(to, result) for result in results), NONE])


def pair_table(block: PairMap, variables: Mapping[str, Variable]) -> np.ndarray:
    """(values + 1, values + 1): the result for every pair of codes; none of anything is none."""
    first, second, to = (variables[name] for name in (block.first, block.second, block.output))
    table = [[_code(to, block.function(one, other)) for other in values_of(second)] for one in values_of(first)]
    return np.pad(table, (0, 1), constant_values=NONE)


def selector_table(block: Aggregate | SelectorWidth, variables: Mapping[str, Variable]) -> np.ndarray:
    """(query values + 1, key values + 1) bool; False where either is none."""
    queries, keys = values_of(variables[block.query]), values_of(variables[block.key])
    return np.pad([[bool(block.predicate(k, q)) for k in keys] for q in queries], (0, 1))


def values_of(variable: Variable) -> tuple[Any, ...]:
    """Of a categorical variable."""
    assert variable.values is not None
    return variable.values


def _inferred(block: Block, earlier: dict[str, Variable], n_ctx: int) -> Variable:
    """The variable that a block makes. Raises `ProgramError` for inputs of the wrong kind."""
    inputs = [earlier[name] for name in block.inputs]
    numerical = [v.numerical for v in inputs]
    wanted = {Linear: [True, True], Aggregate: [False, False, numerical[-1]]}.get(type(block), [False] * len(inputs))
    if numerical != wanted:
        kinds = ", ".join(f"{v.name} is {'numerical' if v.numerical else 'categorical'}" for v in inputs)
        raise ProgramError(f"block {block.output!r}, a {type(block).__name__}, cannot read these: {kinds}")
    if isinstance(block, PairMap) and block.first == block.second:
        raise ProgramError(f"block {block.output!r} maps pairs of {block.first!r} with itself; use a TokenMap")
    if isinstance(block, Linear):
        return Variable(block.output, None)
    if isinstance(block, SelectorWidth):
        return Variable(block.output, tuple(range(n_ctx)))
    if isinstance(block, Aggregate):
        return Variable(block.output, inputs[2].values)
    assert isinstance(block, TokenMap | PairMap)
    results = [block.function(*values) for values in itertools.product(*map(values_of, inputs))]
    if isinstance(block, TokenMap) and block.numerical:
        if min(results) < 0:
            raise ProgramError(f"block {block.output!r} maps to {min(results)}; one ReLU unit holds 0 or more")
        return Variable(block.output, None)
    some = {r for r in results if r is not None}
    if not some:
        raise ProgramError(f"block {block.output!r} makes none of everything")
    return Variable(block.output, tuple(sorted(some, key=_order)))


def _code(variable: Variable, value: Any) -> int:
    values = values_of(variable)
    return values.index(value) if value in values else NONE


def _order(value: Any) -> tuple[int, float, str]:
    return (1, 0.0, value) if isinstance(value, str) else (0, float(value), "")
