"""The configuration: what is legal is taken as meant, what is not is refused with the key and the legal values."""

import copy
import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from saeflow.config import (
    ConfigError,
    CorpusConfig,
    DictionaryConfig,
    JacobianConfig,
    PointConfig,
    TokensConfig,
    TrainingConfig,
    build,
    takes_list,
)

POINT = {
    "corpus": {"name": "c", "path": "text.jsonl"},
    "tokens": {"context_size": 32, "train_tokens": 4096, "held_out_tokens": 1024},
    "model": {"name": "m", "path": "folder"},
    "activations": {},
    "site": {"hook_name": "blocks.0.hook_mlp_out"},
    "dictionary": {"kind": "sae", "activation": "topk", "k": 4},
    "training": {"n_tokens": 8192},
    "jacobian": {},
    "heads": {},
    "evaluation": {},
    "seed": 0,
}


def point(**values) -> PointConfig:
    """The point with the values at some dotted paths (`__` for the dot) set; `...` takes a key away."""
    tree = copy.deepcopy(POINT)
    for path, value in values.items():
        *parents, leaf = path.split("__")
        node = tree
        for part in parents:
            node = node[part]
        if value is ...:
            del node[leaf]
        else:
            node[leaf] = value
    return build(PointConfig, tree)


def test_groups_become_their_dataclasses_with_defaults():
    built = point()
    assert built.corpus == CorpusConfig(name="c", path="text.jsonl")
    assert built.training == TrainingConfig(n_tokens=8192) and built.jacobian == JacobianConfig()


def test_built_config_builds_itself_again():
    built = point(training__loggers=["wandb"], jacobian__thresholds=[1, 0.5])
    assert build(PointConfig, dataclasses.asdict(built)) == built


@pytest.mark.parametrize(
    ("values", "message"),
    [
        # unknown and missing keys
        (
            {"dictionary__l1_coeficient": 1.0},
            r"unknown key dictionary.l1_coeficient \(did you mean 'l1_coefficient'\?\); legal here: kind, ",
        ),
        ({"dictionery": {}}, r"unknown key dictionery \(did you mean 'dictionary'\?\); legal here: corpus, tokens, "),
        ({"training__n_tokens": ...}, "missing key training.n_tokens"),
        ({"site": ...}, "missing key site"),
        # wrong types
        ({"training": 3}, "training=3 must be a group of keys"),
        ({"training__lr": "fast"}, "training.lr='fast' must be of type float"),
        ({"training__batch_size": 10.5}, "training.batch_size=10.5 must be of type int"),
        ({"training__batch_size": True}, "training.batch_size=True must be of type int"),
        ({"training__lr": True}, "training.lr=True must be of type float"),
        ({"training__lr": float("nan")}, "training.lr=nan must be a finite number"),
        ({"dictionary__k": "many"}, "dictionary.k='many' must be of type int"),
        ({"tokens__prepend_bos": 1}, "tokens.prepend_bos=1 must be of type bool"),
        ({"corpus__name": None}, "corpus.name=None must be of type str"),
        ({"training__loggers": "wandb"}, "training.loggers='wandb' must be a list"),
        ({"jacobian__thresholds": [0.1, "b"]}, r"jacobian.thresholds\[1\]='b' must be of type float"),
        (
            {"activations__dtype": "float64"},
            "activations.dtype='float64' is not legal: use one of float32, float16, bfloat16",
        ),
        ({"training__loggers": ["csv"]}, r"training.loggers\[0\]='csv' is not legal: use one of wandb, tensorboard"),
        # ranges
        ({"tokens__context_size": 1}, "tokens.context_size=1 is out of range: it must be 2 or more"),
        (
            {"tokens__held_out_fraction": 1.0},
            "tokens.held_out_fraction=1.0 is out of range: it must be between 0 and 1",
        ),
        ({"tokens__held_out_fraction": 0}, "tokens.held_out_fraction=0.0 is out of range"),
        (
            {"tokens__held_out_tokens": 31},
            r"tokens.held_out_tokens=31 is out of range: it must be one row \(32\) or more",
        ),
        ({"activations__shard_tokens": 5000}, "activations.shard_tokens=5000 .*a multiple of activations.chunk_tokens"),
        ({"activations__batch_rows": 0}, "activations.batch_rows=0 is out of range"),
        ({"training__n_tokens": 100}, "training.n_tokens=100 is out of range: it must be one batch or more"),
        *(
            ({f"training__{name}": -5}, f"training.{name}=-5 is out of range: it must be 0 or more")
            for name in (
                "lr_warm_up_steps",
                "lr_decay_steps",
                "l1_warm_up_steps",
                "shuffle_seed",
                "resample_warm_up_steps",
                "jacobian_warm_up_steps",
            )
        ),
        (
            {"training__order": "buffered", "training__buffer_tokens": 15},
            "training.buffer_tokens=15 is out of range: it must be training.batch_size=.* or more with order=buffered",
        ),
        ({"training__buffer_tokens": 0}, "training.buffer_tokens=0 is out of range"),
        ({"training__auxk_coefficient": -1.0}, "training.auxk_coefficient=-1.0 is out of range"),
        ({"training__adam_beta2": 1.0}, "training.adam_beta2=1.0 is out of range: it must be 0 or more and below 1"),
        ({"training__checkpoint_seconds": -1}, "training.checkpoint_seconds=-1.0 is out of range"),
        ({"evaluation__resamples": 4}, "evaluation.resamples=4 is out of range"),
        ({"site__layer": -1}, "site.layer=-1 is out of range: it must be 0 or more"),
        ({"training__lr": 0}, "training.lr=0.0 is out of range: it must be more than 0"),
        ({"jacobian__bins": 0}, "jacobian.bins=0 is out of range"),
        ({"jacobian__max_value": 0}, "jacobian.max_value=0.0 is out of range"),
        ({"evaluation__batch_rows": -1}, "evaluation.batch_rows=-1 is out of range"),
        ({"seed": -1}, "seed=-1 is out of range"),
        # dictionaries
        ({"dictionary__k": 0}, "dictionary.k=0 is out of range: it must be 1 or more with activation=topk"),
        ({"dictionary__k": ...}, "dictionary.k=None is out of range"),
        (
            {"dictionary__l1_coefficient": 0.1},
            "dictionary.l1_coefficient=0.1 is out of range: it must be null with activation=topk",
        ),
        (
            {"dictionary": {"kind": "sae", "activation": "relu"}},
            "l1_coefficient=None .* 0 or more with activation=relu",
        ),
        (
            {"dictionary": {"kind": "sae", "activation": "relu", "l1_coefficient": -1}},
            "l1_coefficient=-1.0 is out of range",
        ),
        (
            {"dictionary": {"kind": "sae", "activation": "relu", "l1_coefficient": float("inf")}},
            "=inf must be a finite",
        ),
        (
            {"dictionary": {"kind": "sae", "activation": "relu", "l1_coefficient": 1, "k": 3}},
            "k=3 .*null with activation",
        ),
        ({"dictionary__expansion": None}, "set exactly one of dictionary.expansion and dictionary.d_sae"),
        ({"dictionary__d_sae": 64}, "set exactly one of dictionary.expansion and dictionary.d_sae"),
        ({"dictionary__expansion": 0}, "dictionary.expansion or d_sae=0 is out of range"),
        # combinations
        ({"corpus__dataset": "d"}, "set exactly one of corpus.path, corpus.dataset and corpus.case"),
        ({"corpus__path": None}, "set exactly one of corpus.path, corpus.dataset and corpus.case"),
        ({"model__path": None}, "set exactly one of model.path .* and tracr"),
        (
            {"site__hook_name_out": "blocks.0.hook_mlp_out"},
            r"kind=sae reads one hook, but this site has two .*use site=mlp_in",
        ),
        (
            {"dictionary__kind": "transcoder"},
            "kind=transcoder needs a site with hook_name and hook_name_out: use site=mlp",
        ),
        ({"dictionary__kind": "pair"}, "kind=pair needs a site with hook_name and hook_name_out"),
        (
            {"dictionary": {"kind": "pair", "activation": "relu", "l1_coefficient": 1}, "site__hook_name_out": "x"},
            "dictionary.activation=relu is out of range: it must be topk with kind=pair",
        ),
    ],
)
def test_what_cannot_run_is_refused_by_its_key(values, message):
    with pytest.raises(ConfigError, match=message):
        point(**values)


@given(st.integers(0, 10**6))
def test_equal_numbers_become_equal_whatever_their_spelling(n):
    whole, spelt = build(DictionaryConfig, relu(n)), build(DictionaryConfig, relu(float(n)))
    assert whole == spelt and type(whole.l1_coefficient) is type(spelt.l1_coefficient) is float
    tokens = {"context_size": 2, "held_out_tokens": 2}
    assert type(build(TokensConfig, tokens | {"train_tokens": float(n + 2)}).train_tokens) is int


def relu(l1_coefficient: float) -> dict:
    return {"kind": "sae", "activation": "relu", "l1_coefficient": l1_coefficient}


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("training.loggers", True),
        ("jacobian.thresholds", True),
        ("dictionary.l1_coefficient", False),
        ("dictionary.k", False),
        ("dictionary", False),
        ("nowhere.at.all", False),
    ],
)
def test_fields_that_are_lists_themselves_are_no_axis(path, expected):
    assert takes_list(path) is expected
