"""From a program to the weights of a transformer that computes it exactly, by Tracr's rules.

Every value of a categorical variable, and every numerical variable, has a direction of the residual stream of its own;
`one` is 1 everywhere. Directions are sorted by variable and value. Blocks become sublayers (attention 0, MLP 0,
attention 1, ...), each as low as what it reads allows:

    TokenMap        MLP, a ReLU unit a result:   hidden_r = ReLU(sum of the inputs that map to r)
    PairMap         MLP, a ReLU unit a pair:     hidden_ij = ReLU(x_i + y_j - one)
    Linear          MLP, four ReLU units:        a (ReLU(x) - ReLU(-x)) + b (ReLU(y) - ReLU(-y))
    Aggregate       head: c score[q, k] for what is selected, c / 2 for BOS, so that with nothing selected BOS answers 0
    SelectorWidth   head that always attends to BOS and writes 1 / (width + 1); MLP that turns this number into a width

Scores are divided by sqrt(d_head) before the softmax. c is 100, as in Tracr, and more where d_head is so large that BOS
would leak: 40 sqrt(d_head). Tracr's step of width 1/100 in the MLP of a SelectorWidth is too wide for ten positions;
here it is as narrow as the widths need.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from saeflow.groundtruth.program import (
    BOS,
    Aggregate,
    Block,
    Linear,
    PairMap,
    Program,
    ProgramError,
    SelectorWidth,
    TokenMap,
    map_table,
    pair_table,
    selector_table,
)

if TYPE_CHECKING:
    from transformer_lens import HookedTransformer

COLDNESS = 100.0
LEAST_SCORE = 40.0  # of what is selected, after the division by sqrt(d_head): BOS then leaks exp(-20)


@dataclass(frozen=True)
class VariableLocation:
    """Where a variable is made and held."""

    columns: tuple[int, ...]
    """Its directions of the residual stream, by value."""
    sublayer: int
    """-1: the embedding; 2 L: attention of layer L; 2 L + 1: its MLP."""
    head: int | None = None


@dataclass(frozen=True)
class Compiled:
    """A transformer without norms, its weights by TransformerLens's names and in its shapes, float64."""

    program: Program
    config: dict[str, Any]
    """Fields of `HookedTransformerConfig`."""
    directions: tuple[str, ...]
    """(d_model,): `tokens:x`, `indices:0`, ..., `one`."""
    weights: dict[str, np.ndarray]
    locations: dict[str, VariableLocation]
    """By variable."""

    def variables_at(self, hook_name: str) -> dict[str, tuple[int, ...]]:
        """Variables that the value at a hook of the residual stream's width holds, with their directions.

        `blocks.L.hook_mlp_out` and `hook_attn_out` hold what that sublayer makes, `hook_resid_*` all that is made
        before; other hooks raise `ProgramError`.
        """
        sublayers = written_before(hook_name)
        return {name: location.columns for name, location in self.locations.items() if location.sublayer in sublayers}


def written_before(hook_name: str) -> range:
    """Sublayers whose sum a hook of the residual stream, or of what is added to it, holds."""
    parts = hook_name.split(".")
    if parts[0] == "blocks" and len(parts) == 3:
        attention = 2 * int(parts[1])
        found = {
            "hook_resid_pre": range(-1, attention),
            "hook_attn_out": range(attention, attention + 1),
            "hook_resid_mid": range(-1, attention + 1),
            "hook_mlp_in": range(-1, attention + 1),
            "hook_mlp_out": range(attention + 1, attention + 2),
            "hook_resid_post": range(-1, attention + 2),
        }
        if parts[2] in found:
            return found[parts[2]]
    raise ProgramError(f"no variables are known at {hook_name!r}; use a hook_resid_*, hook_attn_out or hook_mlp_out")


def compile_program(program: Program) -> Compiled:
    """Compiles a program. Raises `ProgramError` for one that has no meaning."""
    return _Compiler(program).compiled()


def hooked_transformer(config: dict[str, Any], weights: dict[str, Any]) -> "HookedTransformer":
    """A `HookedTransformer` of a config and float32 weights by TransformerLens's names; imports it (ten seconds)."""
    import torch
    from transformer_lens import HookedTransformer, HookedTransformerConfig

    model = HookedTransformer(HookedTransformerConfig(**config, dtype=torch.float32, device="cpu", seed=0))
    state = {name: torch.as_tensor(value, dtype=torch.float32) for name, value in weights.items()}
    missing, unknown = model.load_state_dict(state, strict=False)
    lacking = [name for name in missing if not name.endswith((".mask", ".IGNORE"))]
    if lacking or unknown:
        raise ProgramError(f"the weights do not fit the config: {lacking} are missing, {unknown} are unknown")
    return model.eval().requires_grad_(False)


class _Compiler:
    def __init__(self, program: Program) -> None:
        self.program, self.variables = program, program.variables
        self.sublayer: dict[str, int] = {"tokens": -1, "indices": -1}
        for block in program.blocks:
            below = max(self.sublayer[name] for name in block.inputs)
            wants_mlp = not isinstance(block, Aggregate | SelectorWidth)
            lowest = below + 1 if (below + 1) % 2 == wants_mlp else below + 2
            self.sublayer[block.output] = lowest + 1 if isinstance(block, SelectorWidth) else lowest
        self.n_layers = max(self.sublayer.values()) // 2 + 1
        names = {name: _direction_names(name, v.values) for name, v in self.variables.items()}
        names |= {_width_of(b): [_width_of(b)] for b in program.blocks if isinstance(b, SelectorWidth)}
        names |= {"tokens": _direction_names("tokens", program.vocabulary), "one": ["one"]}
        self.directions = tuple(direction for name in sorted(names) for direction in names[name])
        self.column = {direction: i for i, direction in enumerate(self.directions)}

    def columns(self, name: str) -> list[int]:
        """Directions of a variable by its codes: of `tokens` only the words have one."""
        return [self.column[direction] for direction in _direction_names(name, self.variables[name].values)]

    def compiled(self) -> Compiled:
        program, d = self.program, len(self.directions)
        heads: list[list[Aggregate | SelectorWidth]] = [[] for _ in range(self.n_layers)]
        hidden: list[list[np.ndarray]] = [[] for _ in range(self.n_layers)]  # [W_in column | W_out row], (2, d) a unit
        locations = {n: VariableLocation(tuple(self.columns(n)), -1) for n in ("tokens", "indices")}
        for block in program.blocks:
            sublayer = self.sublayer[block.output]
            layer, head = sublayer // 2, None
            if isinstance(block, Aggregate | SelectorWidth):
                head = len(heads[layer])
                heads[layer].append(block)
            if not isinstance(block, Aggregate):
                hidden[layer] += self._units(block)
            locations[block.output] = VariableLocation(tuple(self.columns(block.output)), sublayer, head)

        n_heads = max(1, *(len(some) for some in heads))
        d_head = max([1, *(self._wide(block) for some in heads for block in some)])
        d_mlp = max(1, *(len(some) for some in hidden))
        config = {
            "n_layers": self.n_layers, "n_heads": n_heads, "d_model": d, "d_head": d_head, "d_mlp": d_mlp,
            "n_ctx": program.n_ctx, "d_vocab": len(program.vocabulary),
            "d_vocab_out": 1 if program.output_variable.numerical else len(program.output_variable.values or ()),
            "act_fn": "relu", "normalization_type": None, "positional_embedding_type": "standard",
            "attention_dir": "causal" if program.causal else "bidirectional",
        }  # fmt: skip
        weights = empty_weights(config)
        for i, word in enumerate(program.vocabulary):
            weights["embed.W_E"][i, [self.column[f"tokens:{word}"], self.column["one"]]] = 1
        for p in range(1, program.n_ctx):
            weights["pos_embed.W_pos"][p, self.column[f"indices:{p - 1}"]] = 1
        for i, column in enumerate(self.columns(program.output)):
            weights["unembed.W_U"][column, i] = 1
        for layer in range(self.n_layers):
            block_weights = {k.split(".", 2)[2]: w for k, w in weights.items() if k.startswith(f"blocks.{layer}.")}
            for h, head_block in enumerate(heads[layer]):
                self._write_head(block_weights, h, head_block, d_head)
            for i, (into, out) in enumerate(hidden[layer]):
                block_weights["mlp.W_in"][:, i], block_weights["mlp.W_out"][i] = into, out
        return Compiled(program, config, self.directions, weights, locations)

    # ---------------------------------------------------------------- attention
    def _head(self, block: Aggregate | SelectorWidth) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(scores (q, k) in units of the coldness, query directions (q,), key directions (k,)), each in the residual
        stream's order."""
        one, bos = self.column["one"], self.column[f"tokens:{BOS}"]
        queries = np.array(sorted({*self.columns(block.query), one, bos}))
        keys = np.array(sorted({*self.columns(block.key), bos}))
        scores = np.zeros((len(queries), len(keys)))
        locations = np.searchsorted(queries, self.columns(block.query)), np.searchsorted(keys, self.columns(block.key))
        scores[np.ix_(*locations)] = selector_table(block, self.variables)[:-1, :-1]
        always = isinstance(block, SelectorWidth)
        scores[np.searchsorted(queries, one), np.searchsorted(keys, bos)] = 1.0 if always else 0.5
        return scores, queries, keys

    def _wide(self, block: Aggregate | SelectorWidth) -> int:
        """Coordinates of a head that a block needs: for its keys and queries, and for the values that it moves."""
        return max(*self._head(block)[0].shape, len(self.columns(block.value)) if isinstance(block, Aggregate) else 1)

    def _write_head(
        self, weights: dict[str, np.ndarray], head: int, block: Aggregate | SelectorWidth, d_head: int
    ) -> None:
        scores, queries, keys = self._head(block)
        coldness = max(COLDNESS, LEAST_SCORE * d_head**0.5)
        weights["attn.W_Q"][head, queries, : len(keys)] = coldness * scores
        weights["attn.W_K"][head, keys, np.arange(len(keys))] = 1
        if isinstance(block, SelectorWidth):
            moved = [(self.column[f"tokens:{BOS}"], self.column[_width_of(block)])]
        else:
            moved = list(zip(self.columns(block.value), self.columns(block.output), strict=True))
        for i, (value, output) in enumerate(moved):
            weights["attn.W_V"][head, value, i] = 1
            weights["attn.W_O"][head, i, output] = 1

    # ---------------------------------------------------------------- MLPs
    def _units(self, block: Block) -> list[np.ndarray]:
        """Hidden units of a block, (2, d) each: what it reads and what it writes."""
        out = self.columns(block.output)
        units: list[np.ndarray] = []

        def add(reads: list[tuple[int, float]], writes: list[tuple[int, float]]) -> None:
            unit = np.zeros((2, len(self.directions)))
            for row, pairs in zip(unit, (reads, writes), strict=True):
                for column, weight in pairs:
                    row[column] += weight
            units.append(unit)

        if isinstance(block, TokenMap):
            table, columns = map_table(block, self.variables)[:-1], self.columns(block.input)
            if block.numerical:
                add(list(zip(columns, table.tolist(), strict=True)), [(out[0], 1.0)])
            else:
                for code, column in enumerate(out):
                    add([(c, 1.0) for c, result in zip(columns, table, strict=True) if result == code], [(column, 1.0)])
        elif isinstance(block, PairMap):
            pairs = pair_table(block, self.variables)
            first, second, one = self.columns(block.first), self.columns(block.second), self.column["one"]
            for i, x in enumerate(first):
                for j, y in enumerate(second):
                    writes = [(out[pairs[i, j]], 1.0)] if pairs[i, j] >= 0 else []
                    add([(x, 1.0), (y, 1.0), (one, -1.0)], writes)
        elif isinstance(block, Linear):
            for name, factor in zip(block.inputs, block.factors, strict=True):
                for sign in (1.0, -1.0):
                    add([(self.columns(name)[0], sign)], [(out[0], sign * factor)])
        else:
            assert isinstance(block, SelectorWidth)
            self._width_units(block, out, add)
        return units

    def _width_units(self, block: SelectorWidth, out: list[int], add: Any) -> None:
        """From x = 1 / (width + 1) to the width: it is the largest at first, and changes at each threshold t between
        two values of x by ReLU(L (x - t) + 1) - ReLU(L (x - t)), which is 0 below and 1 above. At BOS all is undone."""
        x, one, bos = self.column[_width_of(block)], self.column["one"], self.column[f"tokens:{BOS}"]
        widths = range(len(out) - 1, -1, -1)
        found = np.array([1 / (width + 1) for width in widths])
        thresholds = (found[1:] + found[:-1]) / 2
        steep = 2.0 ** np.ceil(np.log2(max(COLDNESS, 2 / np.diff(found).min())))
        add([(one, 1.0)], [(out[widths[0]], 1.0)])
        for t, before, after in zip(thresholds, widths, widths[1:], strict=False):
            for offset, sign in ((1.0, 1.0), (0.0, -1.0)):
                add([(x, steep), (one, offset - steep * t)], [(out[after], sign), (out[before], -sign)])
        add([(bos, 1.0)], [(x, -1.0), (out[0], -1.0)])


def _direction_names(name: str, values: tuple[Any, ...] | None) -> list[str]:
    return [name] if values is None else [f"{name}:{value}" for value in values]


def _width_of(block: Block) -> str:
    return f"{block.output}_attention"


def empty_weights(config: dict[str, Any]) -> dict[str, np.ndarray]:
    """Zeros for every parameter of a transformer without norms, by TransformerLens's names."""
    H, d, h, m = (config[name] for name in ("n_heads", "d_model", "d_head", "d_mlp"))
    shapes: dict[str, tuple[int, ...]] = {"embed.W_E": (config["d_vocab"], d), "pos_embed.W_pos": (config["n_ctx"], d)}
    for layer in range(config["n_layers"]):
        each = {
            "attn.W_Q": (H, d, h), "attn.W_K": (H, d, h), "attn.W_V": (H, d, h), "attn.W_O": (H, h, d),
            "attn.b_Q": (H, h), "attn.b_K": (H, h), "attn.b_V": (H, h), "attn.b_O": (d,),
            "mlp.W_in": (d, m), "mlp.b_in": (m,), "mlp.W_out": (m, d), "mlp.b_out": (d,),
        }  # fmt: skip
        shapes |= {f"blocks.{layer}.{name}": shape for name, shape in each.items()}
    shapes |= {"unembed.W_U": (d, config["d_vocab_out"]), "unembed.b_U": (config["d_vocab_out"],)}
    return {name: np.zeros(shape) for name, shape in shapes.items()}
