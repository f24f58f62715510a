"""Trained models of the cases, how their alignment is measured, and InterpBench's published folders."""

import pickle  # noqa: TID251 -- to write what the reader must read, or refuse
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from saeflow.config import ConfigError, TracrConfig
from saeflow.groundtruth import training as module
from saeflow.groundtruth.cases import get_case, small_config
from saeflow.groundtruth.compiler import hooked_transformer
from saeflow.groundtruth.interpbench import InterpBenchError, plain_pickle, read_interpbench
from saeflow.groundtruth.network import Network, Node, initial_weights
from saeflow.groundtruth.training import Alignment, Truth, _Steps, align, loss_of, pairs, quality, train_small


# -------------------------------------------------------------------- alignment
def test_case_3_has_the_published_sizes_and_nodes() -> None:
    case = get_case(3)
    config = small_config(case)
    sizes = {"n_layers": 2, "n_heads": 4, "d_head": 3, "d_model": 12, "d_mlp": 48, "n_ctx": 5, "d_vocab_out": 1}
    assert {name: config[name] for name in sizes} == sizes
    assert sum(w.size for w in initial_weights(config, 0).values()) == 3817
    found = align(case, config)
    assert found.on_circuit == {Node(0): ("is_x",), Node(1, 2): ("frac_prevs",)}
    assert set(found.off_circuit) == {
        Node(0, 0),
        Node(0, 1),
        Node(0, 2),
        Node(0, 3),
        Node(1, 0),
        Node(1, 1),
        Node(1, 3),
        Node(1),
    }


@pytest.mark.parametrize("number", [3, 4, 12, 13, 14, 42, 60, 87])
def test_compiled_model_is_perfectly_aligned(number: int) -> None:
    """The model is the program: interchanging a node is interchanging its variables, for every node."""
    case = get_case(number)
    truth = Truth(case, case.rows(25, seed=1))
    network = Network(case.compiled.config, case.compiled.weights, torch.float64)
    on: dict[Node, tuple[str, ...]] = {}
    for name, location in case.compiled.locations.items():
        if location.sublayer >= 0:
            node = Node(location.sublayer // 2, None if location.sublayer % 2 else location.head)
            on[node] = (*on.get(node, ()), name)
    every = [
        Node(layer, head)
        for layer in range(network.config["n_layers"])
        for head in (*range(network.config["n_heads"]), None)
    ]
    alignment = Alignment(on, tuple(node for node in every if node not in on))
    found = quality(network, truth, alignment, *pairs(len(truth.rows)))
    if number == 14:  # its head counts too: it is the one node that stands for no variable of the program
        assert found.strict.pop("blocks.0.attn.0") < 0.9
    assert found.worst == 1.0


def test_quality_equals_hooks_in_transformer_lens_pair_by_pair() -> None:
    """Interchanges by TransformerLens's own hooks (hook_result, mlp.hook_post), and the chain's shortcut: in case 3 the
    program with any variable from s says what it says on s."""
    case = get_case(3)
    config, truth = small_config(case), Truth(case, case.rows())
    trained = train_small(case, truth.rows, TracrConfig(3, n_steps=30), n_pairs=1)
    model = hooked_transformer(config | {"use_attn_result": True}, trained.network.weights())
    base, source = pairs(320, 600, seed=5)
    found = quality(trained.network, truth, trained.alignment, base, source)
    tokens, labels = torch.from_numpy(truth.rows), case.labels(truth.rows)
    _, cache = model.run_with_cache(tokens[source])
    for node in (*trained.alignment.on_circuit, *trained.alignment.off_circuit):
        hook = f"blocks.{node.layer}." + ("mlp.hook_post" if node.head is None else "attn.hook_result")

        def put(value: torch.Tensor, hook: Any, node: Node = node) -> torch.Tensor:
            if node.head is None:
                return cache[hook.name]
            value[:, :, node.head] = cache[hook.name][:, :, node.head]
            return value

        output = model.run_with_hooks(tokens[base], fwd_hooks=[(hook, put)])[..., 0].numpy()
        wanted = labels[source] if node in trained.alignment.on_circuit else labels[base]
        share = (np.abs(output - wanted)[:, 1:] < case.tolerance).mean()
        assert {**found.iia, **found.strict}[node.name] == pytest.approx(share, abs=2e-3)


def test_losses_leave_out_bos_and_what_is_none() -> None:
    output = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(0))
    labels = np.array([[0, 1, -1, 2], [4, 4, 4, -1], [-1, 0, 0, 0]])
    rows = [(i, p) for i in range(3) for p in range(1, 4) if labels[i, p] >= 0]
    wanted = -np.mean([output[i, p].log_softmax(0)[labels[i, p]].item() for i, p in rows])
    assert loss_of(output, labels, numerical=False).item() == pytest.approx(wanted, rel=1e-5)
    numbers = np.arange(12.0).reshape(3, 4) / 12
    wanted = ((output[:, 1:, 0].numpy() - numbers[:, 1:]) ** 2).mean()
    assert loss_of(output, numbers, numerical=True).item() == pytest.approx(wanted, rel=1e-5)


# -------------------------------------------------------------------- training
@pytest.mark.slow
@pytest.mark.parametrize(("seed", "n_pairs"), [(0, 320 * 320), (1, 8192), (2, 8192)])
def test_siit_reaches_accuracy_iia_and_strict_accuracy(seed: int, n_pairs: int) -> None:
    """Of one model on all pairs of rows, as its folder states it, of the others on some. Other processors round
    otherwise, and after 300 steps one node may still be at 0.983."""
    case = get_case(3)
    rows = case.rows()
    found = train_small(case, rows, TracrConfig(3, "siit", seed, n_steps=400), n_pairs).quality
    assert found.worst >= 0.99, found


def test_supervised_model_is_right_for_other_reasons_and_iit_lacks_strictness() -> None:
    case = get_case(3)
    rows = case.rows()
    supervised = train_small(case, rows, TracrConfig(3, "supervised", n_steps=100), n_pairs=4096).quality
    assert supervised.accuracy >= 0.99 and max(supervised.iia.values()) < 0.7
    iit = train_small(case, rows, TracrConfig(3, "iit", n_steps=200), n_pairs=4096).quality
    assert iit.accuracy >= 0.99 and min(iit.iia.values()) >= 0.99 and min(iit.strict.values()) < 0.9


def test_training_is_a_function_of_its_seed() -> None:
    case = get_case(3)
    recipes = [TracrConfig(3, seed=seed, n_steps=3) for seed in (1, 1, 2)]
    one, same, other = (train_small(case, case.rows(), recipe, n_pairs=1).network.weights() for recipe in recipes)
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not torch.equal(one["embed.W_E"], other["embed.W_E"])


def test_the_recipe_of_interpbench() -> None:
    """Every row without PAD once an epoch, each with one source for good; a rate that stays; a strict loss of weight
    100, clipped at 0.1; the last weights, once they are good enough."""
    case = get_case(3)
    rows, config = case.rows(), small_config(case)
    recipe = TracrConfig(3, "siit", recipe="interpbench", n_steps=6, batch_rows=100, lr=1e-3)
    network = Network(config, initial_weights(config, 0))
    steps = _Steps(network, Truth(case, rows), align(case, config), recipe)
    without = np.flatnonzero((rows != case.program.token_id("PAD")).all(1))
    assert len(without) == 4**4
    sources: dict[int, set[int]] = {}
    for epoch in range(2):
        batches = [steps._next(3 * epoch + i) for i in range(3)]
        assert sorted(np.concatenate([base for base, _ in batches])) == without.tolist()
        for base, source in batches:
            for b, s in zip(base.tolist(), source.tolist(), strict=True):
                sources.setdefault(b, set()).add(s)
    assert all(len(found) == 1 for found in sources.values())
    before = {name: p.detach().clone() for name, p in network.parameters.items()}
    norms: list[float] = []
    clip = torch.nn.utils.clip_grad_norm_
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            torch.nn.utils, "clip_grad_norm_", lambda p, most: (norms.append(float(clip(p, most))), most == 0.1)
        )
        losses = steps.train_step(5)
    assert steps.optimiser.param_groups[0]["lr"] == 1e-3 and len(norms) == 3
    assert norms[1] > 10 * max(norms[0], norms[2]) and losses["strict"] < 1  # of a loss that is said without its weight
    assert any(not torch.equal(p, before[name]) for name, p in network.parameters.items())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "CHECK_EVERY", 2)
        patch.setitem(module.RECIPES, "interpbench", module.RECIPES["interpbench"]._replace(enough=0.0))
        assert [row["step"] for row in train_small(case, rows, recipe, 100).curve] == [2]  # what is enough ends it
    with pytest.raises(ConfigError, match=r"recipe=interpbench .* saeflow unless model.tracr.method is iit or siit"):
        TracrConfig(3, "supervised", recipe="interpbench")


# -------------------------------------------------------------------- InterpBench's folders
def publish(folder: Path, config: dict[str, Any], weights: dict[str, Any]) -> Path:
    """A folder as InterpBench publishes it: the whole `HookedTransformerConfig`, and a state dict with buffers."""
    folder.mkdir()
    extra = {"model_name": "custom", "dtype": torch.float32, "device": torch.device("cuda", 0), "eps": 1e-5, "seed": 0}
    extra |= {"use_attn_result": True, "window_size": None, "attn_types": ["global"], "n_params": 3817}
    (folder / "ll_model_cfg.pkl").write_bytes(pickle.dumps(config | extra))
    state = {name: torch.as_tensor(w) for name, w in weights.items()}
    torch.save(state | {"blocks.0.attn.mask": torch.ones(5, 5).bool()}, folder / "ll_model.pth")  # noqa: TID251
    return folder


def test_published_folder_opens_and_computes_the_same(tmp_path: Path) -> None:
    case = get_case(3)
    config = small_config(case)
    weights = initial_weights(config, 7)
    found = read_interpbench(publish(tmp_path / "3", config, weights))
    tokens = torch.from_numpy(case.rows(20))
    torch.testing.assert_close(
        Network(found.config, found.weights)(tokens).output, Network(config, weights)(tokens).output
    )
    assert {"dtype", "device"}.isdisjoint(found.config)


class Hostile:
    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> Any:
        return (Path.touch, (self.trace,))


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("protocol", [0, 2, 4])
@pytest.mark.parametrize("file", ["ll_model_cfg.pkl", "ll_model.pth"])
def test_hostile_file_is_refused_and_nothing_of_it_runs(tmp_path: Path, file: str, protocol: int) -> None:
    config = small_config(get_case(3))
    folder = publish(tmp_path / "3", config, initial_weights(config, 0))
    trace = tmp_path / "it ran"
    (folder / file).write_bytes(pickle.dumps(config | {"seed": Hostile(trace)}, protocol))
    with pytest.raises(InterpBenchError, match=f"{file} is (refused|not a file of weights alone)"):
        read_interpbench(folder)
    assert not trace.exists()
    pickle.loads((folder / file).read_bytes())  # it would have
    assert trace.exists()


@pytest.mark.parametrize("named", [eval, Path, torch.load, torch.device])  # noqa: TID251
def test_a_name_alone_is_refused_too(tmp_path: Path, named: Any) -> None:
    (tmp_path / "cfg.pkl").write_bytes(pickle.dumps({"act_fn": named}))
    with pytest.raises(InterpBenchError, match="is refused: it names"):
        plain_pickle(tmp_path / "cfg.pkl")


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.tuples(inner, inner) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=12,
)


@settings(max_examples=50, deadline=None)
@given(PLAIN, st.integers(0, 5))
def test_plain_data_reads_as_pickle_reads_it(
    tmp_path_factory: pytest.TempPathFactory, data: Any, protocol: int
) -> None:
    file = tmp_path_factory.getbasetemp() / "plain.pkl"
    file.write_bytes(pickle.dumps([data, data], protocol))
    assert plain_pickle(file) == [data, data]


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=60))
def test_any_bytes_are_read_or_refused(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    file = tmp_path_factory.getbasetemp() / "any.pkl"
    file.write_bytes(content)
    try:
        plain_pickle(file)
    except InterpBenchError as error:
        assert str(file) in str(error)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"normalization_type": "LN"}, "normalization_type is 'LN'; a case's model has None"),
        ({"d_mlp": 7}, "blocks.0.mlp.W_in has shape"),
    ],
)
def test_model_that_is_no_case_is_refused(tmp_path: Path, change: dict[str, Any], says: str) -> None:
    config = small_config(get_case(3))
    folder = publish(tmp_path / "3", config, initial_weights(config, 0))
    (folder / "ll_model_cfg.pkl").write_bytes(pickle.dumps(config | change))
    with pytest.raises(InterpBenchError, match=says):
        read_interpbench(folder)
    (folder / "ll_model.pth").unlink()
    with pytest.raises(InterpBenchError, match=r"has no ll_model\.pth"):
        read_interpbench(folder)


@pytest.mark.parametrize("inner", ["tuple", "list", "dict", "key"])
def test_a_pickle_that_only_costs_time_is_refused_at_once(tmp_path, inner):
    """Sixty containers, each with the one before twice: 2^60 values of 426 bytes."""
    file = tmp_path / "cfg.pkl"
    twice = {  # of the memo's entry n - 1
        "tuple": lambda n: b"h%ch%c\x86q%c" % (n - 1, n - 1, n),
        "list": lambda n: b"](h%ch%ceq%c" % (n - 1, n - 1, n),
        "dict": lambda n: b"}(K\x01h%cK\x02h%cuq%c" % (n - 1, n - 1, n),
        "key": lambda n: b"h%ch%c\x86q%c}h%cNs0" % (n - 1, n - 1, n, n),
    }[inner]
    file.write_bytes(
        b"\x80\x02" + (b")" if inner == "key" else b"]") + b"q\x00" + b"".join(map(twice, range(1, 61))) + b"."
    )
    started = time.monotonic()
    with pytest.raises(InterpBenchError, match="refused"):
        plain_pickle(file)
    assert time.monotonic() - started < 5


@pytest.mark.parametrize("content", [b"]q\x00h\x00a.", b"\x80\x02" + b"(" * 50_000 + b"t" * 50_000 + b"."])
def test_a_pickle_without_an_end_is_refused_by_name(tmp_path, content):
    """A list in itself; tuples fifty thousand deep."""
    file = tmp_path / "cfg.pkl"
    file.write_bytes(content)
    with pytest.raises(InterpBenchError, match=r"cfg\.pkl"):
        plain_pickle(file)
