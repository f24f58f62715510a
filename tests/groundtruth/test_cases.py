"""Programs, their compiled models and the cases: exact against plain Python on words, and against each other."""

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from saeflow.config import ConfigError
from saeflow.groundtruth.cases import CASES, Case, get_case
from saeflow.groundtruth.compiler import compile_program, hooked_transformer
from saeflow.groundtruth.network import Network, initial_weights
from saeflow.groundtruth.program import (
    Aggregate,
    Linear,
    PairMap,
    Program,
    ProgramError,
    SelectorWidth,
    TokenMap,
)

TRENDS = {-1: "increasing", 0: "constant", 1: "decreasing"}
IN_PYTHON = {  # what each case says on a list of words, written without any of its blocks
    3: lambda w: [w[: i + 1].count("x") / (i + 1) for i in range(len(w))],
    39: lambda w: [w[: i + 1].count("x") / (i + 1) for i in range(len(w))],
    4: lambda w: [(w[: i + 1].count("(") - w[: i + 1].count(")")) / (i + 1) for i in range(len(w))],
    12: lambda w: [None if i < 2 else w[i - 2 : i + 1] == ["a", "b", "c"] for i in range(len(w))],
    13: lambda w: [TRENDS[(a > b) - (a < b)] for a, b in itertools.pairwise(w)] + [None],
    14: lambda w: [w.count("a")] * len(w),
    42: lambda w: [w[0]] * len(w),
    60: lambda w: [v + 1 for v in w],
    87: lambda w: [int(v >= 3) for v in w],
}


def words_of(case: Case, row: np.ndarray) -> list[Any]:
    return [word for i in row if (word := case.program.vocabulary[i]) not in ("BOS", "PAD")]


def outputs(case: Case, tokens: np.ndarray, dtype: torch.dtype = torch.float32) -> np.ndarray:
    """Of the compiled model, (N, P, d_vocab_out)."""
    return Network(case.compiled.config, case.compiled.weights, dtype)(torch.from_numpy(tokens)).output.numpy()


def test_every_case_is_tested() -> None:
    assert IN_PYTHON.keys() == CASES.keys()


@pytest.mark.parametrize("number", CASES)
def test_labels_are_what_plain_python_says(number: int) -> None:
    case = get_case(number)
    rows = case.rows(500)
    variable = case.program.output_variable
    for row, labels in zip(rows, case.labels(rows), strict=True):
        words = words_of(case, row)
        said = labels[1 : len(words) + 1]
        if variable.values is None:
            np.testing.assert_allclose(said, IN_PYTHON[number](words), rtol=0, atol=1e-15)
        else:
            assert [None if c < 0 else variable.values[c] for c in said] == IN_PYTHON[number](words)


@pytest.mark.parametrize("number", CASES)
def test_compiled_model_is_exact_at_every_position(number: int) -> None:
    case = get_case(number)
    rows = case.rows(500)
    labels = case.labels(rows)
    n = case.compiled.config["d_vocab_out"]
    wanted = labels[..., None] if case.program.output_variable.numerical else np.eye(n + 1)[labels][..., :n]
    np.testing.assert_allclose(outputs(case, rows), wanted, rtol=0, atol=1e-7)


def test_case_3_has_the_published_rows_and_weights() -> None:
    """The hand layout of Tracr's model, verified to reproduce all 320 x 5 labels."""
    case = get_case(3)
    rows = case.rows()
    assert rows.shape == (320, 5)
    assert rows[:4].tolist() == [[0, 2, 2, 2, 1], [0, 2, 2, 3, 1], [0, 2, 2, 4, 1], [0, 2, 2, 5, 1]]
    assert rows[-3:].tolist() == [[0, 5, 5, 5, 3], [0, 5, 5, 5, 4], [0, 5, 5, 5, 5]]
    np.testing.assert_allclose(case.labels(rows)[3], [0, 0, 0, 1 / 3, 1 / 4])
    compiled = case.compiled
    names = ["frac_prevs", *(f"indices:{i}" for i in range(4)), "is_x", "one"]
    names += [f"tokens:{t}" for t in ("BOS", "PAD", "a", "b", "c", "x")]
    assert list(compiled.directions) == names
    at = {name: i for i, name in enumerate(names)}
    wanted = {name: np.zeros_like(w) for name, w in compiled.weights.items()}
    wanted["embed.W_E"][np.arange(6), 7 + np.arange(6)] = wanted["embed.W_E"][:, at["one"]] = 1
    wanted["pos_embed.W_pos"][np.arange(1, 5), 1 + np.arange(4)] = 1
    wanted["blocks.0.mlp.W_in"][at["tokens:x"], 0] = wanted["blocks.0.mlp.W_out"][0, at["is_x"]] = 1
    head = {k: wanted[f"blocks.1.attn.W_{k}"][0] for k in "QKVO"}
    head["Q"][1:5, :4] = 100 * np.tri(4)
    head["Q"][at["one"], 4] = 50
    head["K"][[1, 2, 3, 4, at["tokens:BOS"]], np.arange(5)] = 1
    head["V"][at["is_x"], 0] = head["O"][0, at["frac_prevs"]] = wanted["unembed.W_U"][at["frac_prevs"], 0] = 1
    for name, w in wanted.items():
        np.testing.assert_array_equal(compiled.weights[name], w, err_msg=name)
    assert {k: compiled.config[k] for k in ("n_layers", "d_model", "d_head", "d_mlp")} == {
        "n_layers": 2, "d_model": 13, "d_head": 6, "d_mlp": 1,
    }  # fmt: skip


def test_hooked_transformer_computes_the_same_and_its_hooks_hold_the_variables() -> None:
    case = get_case(4)
    rows = case.rows(100)
    compiled = case.compiled
    output, cache = hooked_transformer(compiled.config, compiled.weights).run_with_cache(torch.from_numpy(rows))
    np.testing.assert_allclose(output[..., 0].numpy(), case.labels(rows), rtol=0, atol=1e-6)
    values = case.program.run(rows)
    for hook in ("blocks.0.hook_resid_pre", "blocks.0.hook_mlp_out", "blocks.1.hook_attn_out", "blocks.1.hook_mlp_out"):
        held = compiled.variables_at(hook)
        assert held
        for name, columns in held.items():
            n, value = len(columns), values[name]
            wanted = np.eye(n + 1)[value][..., :n] if case.program.variables[name].values else value[..., None]
            np.testing.assert_allclose(cache[hook][..., list(columns)].numpy(), wanted, rtol=0, atol=1e-6)
    assert list(compiled.variables_at("blocks.1.hook_attn_out")) == ["opens", "closes"]
    assert list(compiled.variables_at("blocks.1.hook_resid_post")) == list(case.program.variables)
    with pytest.raises(ProgramError, match="no variables are known at"):
        compiled.variables_at("blocks.0.attn.hook_z")


@pytest.mark.parametrize("causal", [True, False])
def test_network_computes_what_hooked_transformer_does(causal: bool) -> None:
    config = {
        "n_layers": 2, "n_heads": 3, "d_model": 12, "d_head": 4, "d_mlp": 20, "n_ctx": 6, "d_vocab": 7,
        "d_vocab_out": 5, "act_fn": "gelu", "normalization_type": None, "positional_embedding_type": "standard",
        "attention_dir": "causal" if causal else "bidirectional",
    }  # fmt: skip
    rng = np.random.default_rng(0)
    weights = {k: w + 0.3 * rng.standard_normal(w.shape) for k, w in initial_weights(config, 1).items()}
    network = Network(config, weights)
    for name, w in network.weights().items():
        np.testing.assert_array_equal(w.numpy(), weights[name].astype(np.float32), err_msg=name)
    tokens = torch.from_numpy(rng.integers(0, 7, (9, 6)))
    output, cache = hooked_transformer(config, weights).run_with_cache(tokens)
    mine = network(tokens)
    torch.testing.assert_close(mine.output, output, rtol=1e-5, atol=1e-5)
    for layer in range(2):
        torch.testing.assert_close(mine.z[layer], cache[f"blocks.{layer}.attn.hook_z"], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(mine.hidden[layer], cache[f"blocks.{layer}.mlp.hook_post"], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(mine.residual[layer], cache[f"blocks.{layer}.hook_resid_pre"], rtol=1e-5, atol=1e-5)


@st.composite
def programs(draw: st.DrawFn) -> Program:
    """A few blocks with random tables on whatever variables are there."""
    words = tuple(range(draw(st.integers(2, 4))))
    n_ctx = draw(st.integers(2, 6))
    categorical, numerical = ["tokens", "indices"], []
    blocks: list[Any] = []
    for i in range(draw(st.integers(1, 6))):
        name, seed = f"v{i}", draw(st.integers(0, 999))
        kinds = ["map", "number", "pair", "shift", "width"] + ["mean"] * bool(numerical)
        kind = draw(st.sampled_from(kinds + ["linear"] * (len(numerical) > 1)))
        one, other = draw(st.permutations(categorical))[:2]

        def table(*values: Any, seed: int = seed, n: int = 3) -> int:
            return hash((seed, *map(int, values))) % 7 % n

        if kind == "map":
            blocks.append(TokenMap(name, one, lambda v, t=table: [0, 1, None][t(v)]))
        elif kind == "number":
            blocks.append(TokenMap(name, one, lambda v, t=table: t(v) / 2, numerical=True))
        elif kind == "pair":
            blocks.append(PairMap(name, one, other, lambda v, w, t=table: [0, 1, None][t(v, w)]))
        elif kind == "shift":
            offset = draw(st.integers(-2, 2))
            blocks.append(Aggregate(name, "indices", "indices", one, lambda k, q, o=offset: q == k + o))
        elif kind == "width":
            blocks.append(SelectorWidth(name, one, other, lambda k, q, t=table: t(k, q, n=2) == 1))
        elif kind == "mean":
            value = draw(st.sampled_from(numerical))
            blocks.append(Aggregate(name, one, other, value, lambda k, q, t=table: t(k, q, n=2) == 1))
        else:
            blocks.append(Linear(name, *draw(st.permutations(numerical))[:2], factors=(2.0, -0.5)))
        (numerical if kind in ("number", "mean", "linear") else categorical).append(name)
    return Program(words, n_ctx, draw(st.booleans()), tuple(blocks), blocks[-1].output)


@settings(max_examples=60, deadline=None)
@given(programs())
def test_compiled_program_holds_every_variable_of_any_program(program: Program) -> None:
    try:
        compiled = compile_program(program)
    except ProgramError as error:
        assert "none of everything" in str(error)
        return
    rng = np.random.default_rng(0)
    words = rng.integers(0, len(program.words), (20, program.n_ctx))
    tokens = np.array([program.token_id(w) for w in program.words])[words]
    for row, length in zip(tokens, rng.integers(1, program.n_ctx + 1, 20), strict=True):
        row[0], row[length:] = program.token_id("BOS"), program.token_id("PAD")
    values = program.run(tokens)
    held = Network(compiled.config, compiled.weights, torch.float64)(torch.from_numpy(tokens)).residual[-1].numpy()
    for name, location in compiled.locations.items():
        n, value = len(location.columns), values[name]
        wanted = value[..., None] if program.variables[name].numerical else np.eye(n + 1)[value][..., :n]
        np.testing.assert_allclose(held[..., list(location.columns)], wanted, rtol=0, atol=1e-6, err_msg=name)


def test_a_head_may_move_more_values_than_it_has_keys() -> None:
    moves = Aggregate("word", "indices", "indices", "tokens", lambda k, q: k == q)
    compiled = compile_program(Program(tuple(range(9)), n_ctx=2, causal=False, blocks=(moves,), output="word"))
    words = torch.tensor([[compiled.program.token_id("BOS"), compiled.program.token_id(w)] for w in range(9)])
    held = Network(compiled.config, compiled.weights, torch.float64)(words).residual[-1]
    moved = held[:, 1, list(compiled.locations["word"].columns)]
    torch.testing.assert_close(moved, torch.eye(9, dtype=torch.float64), rtol=0, atol=1e-6)


def test_sampled_rows_are_different_seeded_and_of_all_lengths() -> None:
    case = get_case(12)
    rows = case.rows(400, seed=3)
    assert len({row.tobytes() for row in rows}) == 400
    np.testing.assert_array_equal(rows, case.rows(400, seed=3))
    assert (rows != case.rows(400, seed=4)).any()
    pad = case.program.token_id("PAD")
    assert {int((row != pad).sum()) for row in rows} == set(range(4, 16))


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: get_case(1), "there is no case 1; these are: 3, 4, 12"),
        (lambda: get_case(39).rows(), "say how many"),
        (lambda: Program((0,), 4, True, (TokenMap("m", "tokens", lambda v: -1.0, True),), "m").variables, "0 or more"),
        (lambda: Program((0,), 4, True, (TokenMap("m", "n", abs),), "m").variables, "reads 'n'"),
        (lambda: Program((0,), 4, True, (Linear("m", "tokens", "indices", (1, 1)),), "m").variables, "cannot read"),
        (lambda: Program((0,), 4, True, (PairMap("m", "tokens", "tokens", max),), "m").variables, "use a TokenMap"),
    ],
)
def test_what_has_no_meaning_is_refused(call: Any, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        call()
