"""The text of overrides is split as it reads by all who take one; what cannot be read is refused with what to write."""

import shlex
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from saeflow.config import ConfigError
from saeflow.planning.overrides import of_snakemake, parse, quoted, split

NAMES = ("plain", "with space", "it's", "(paren)", "umlaut_ä_海", "lr=0.1", "a,b", "a#b", "a #b: c", "100%", "a&b",
         "{x}", "[x]", "~home", 'say "so"', "x ", "a;b")  # fmt: skip


def values(text: str) -> list:
    return [getattr(one.value(), "text", one.value()) for one in parse(split(text))]


@pytest.mark.parametrize("name", NAMES)
def test_a_quoted_value_is_read_as_it_stands(name: str) -> None:
    path = f"/data/{name}/c.jsonl"
    text = f"dictionary.k=[4, 8] corpus.path={quoted(path)} seed=1"
    assert values(text) == [[4, 8], path, 1]
    assert values(shlex.split(shlex.quote(text))[0]) == [[4, 8], path, 1]


@pytest.mark.parametrize("name", [name for name in NAMES if "'" not in name])
def test_quotes_guarded_from_a_shell_are_quotes(name: str) -> None:
    assert values(f"a=1 corpus.path=\\'/data/{name}/c.jsonl\\' b=2") == [1, f"/data/{name}/c.jsonl", 2]


@given(
    st.text(st.sampled_from("\\'\" a=,[{#"), min_size=1)
    | st.text(st.characters(blacklist_categories=("Cs", "Cc")), min_size=1)
)
def test_any_text_can_be_quoted(text: str) -> None:
    path = f"/{text}"  # Hydra takes a leading ~ as it stands; we refuse it
    assert values(f"corpus.path={quoted(path)}") == [path]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", []),
        (" \n ", []),
        ("a=1\nb=2\t c=3", ["a=1", "b=2", "c=3"]),
        ("sweep=[{a: 1, b.c: [1, 2]}, {d: 'x y'}] seed=0", ["sweep=[{a: 1, b.c: [1, 2]}, {d: 'x y'}]", "seed=0"]),
        ("seed=range(0, 3) k=8", ["seed=range(0, 3)", "k=8"]),
        ("~sweep.pair +sweep.mine={a: 1}", ["~sweep.pair", "+sweep.mine={a: 1}"]),
        (r"a='it\'s here' b=1", [r"a='it\'s here'", "b=1"]),
    ],
)
def test_spaces_separate_outside_of_quotes_and_brackets_alone(text: str, expected: list[str]) -> None:
    assert split(text) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("dictionary.k=[4,8", r"a bracket, its \], is missing at its end"),
        ("corpus.path='/a b", "a quote ' is missing at its end"),
        ("dictionary.k = 8", "'dictionary.k' is no override: write name=value without spaces around ="),
        ("dictionary.k= 8", "'8' is no override: write name=value without spaces around ="),
        ("corpus.path=/a b/c", "'b/c' is no override.*quotes around a value that has spaces"),
        ("'corpus.path=/a b/c'", "is no override.*quotes around a value"),
        ("corpus.path=/a=b/c", "needs quotes around it: corpus.path='/a=b/c'"),
        ("corpus.path=/ä/c", "needs quotes around it: corpus.path='/ä/c'"),
        ("corpus.path='/it's/c'", 'needs quotes around it: corpus.path="/it\'s/c"'),
        ("corpus.path=/a#b", "needs quotes around it: corpus.path='/a#b'"),
        ("experiment=demo, stack", "experiment=demo,: leave no space after ,"),
        ("dictionary.k=[4,,8]", r"cannot read the override dictionary.k=\[4,,8\]: no viable alternative"),
    ],
)
def test_what_cannot_be_read_is_refused_with_what_to_write(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as refused:
        parse(split(text))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("value", ["~/data", "'~/data'", '"~/data"'])
def test_the_home_folder_is_to_be_written_out(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/ann")
    with pytest.raises(ConfigError, match=r"~ is not replaced here; write corpus.path='/home/ann/data'"):
        parse([f"corpus.path={value}"])


def test_commas_of_a_file_that_is_there_are_not_taken_for_a_list(tmp_path: Path) -> None:
    path = tmp_path / "a,b"
    assert parse([f"corpus.path={path}"])[0].is_sweep_override()
    path.mkdir()
    with pytest.raises(ConfigError, match=f"write corpus.path='{path}'"):
        parse([f"corpus.path={path}"])
    assert parse([f"corpus.path='{path}'"])[0].value() == str(path)


def test_snakemake_gives_what_was_typed() -> None:
    """Not what YAML makes of it: of `a #b` the comment would be lost, and `{a: 1}` would be a mapping."""
    typed = "corpus.path='/a #b' sweep={dictionary: relu}"
    assert of_snakemake({"hydra": "corpus.path='/a"}, ["conf=elsewhere", f"hydra={typed}"]) == split(typed)
    assert of_snakemake({"hydra": "experiment=demo seed=1"}, []) == ["experiment=demo", "seed=1"]
    assert of_snakemake({}, []) == []
    assert of_snakemake({"hydra": None, "conf": "x"}, ["hydra=", "conf=x"]) == []


@pytest.mark.parametrize(
    ("config", "arguments", "message"),
    [
        ({"experiment": "demo"}, ["experiment=demo"], '--config hydra="experiment=demo"'),
        (
            {"hydra": "experiment=demo", "dictionary": "topk"},
            ["hydra=experiment=demo", "dictionary=topk"],
            'dictionary=topk is outside of hydra=.*--config hydra="experiment=demo dictionary=topk"',
        ),
        ({"hydra": "b=1"}, ["hydra=a=1", "hydra=b=1"], 'given 2 times: .*--config hydra="a=1 b=1"'),
        ({"hydra": {"experiment": "demo"}}, [], "must be a text of overrides"),
    ],
)
def test_what_fell_outside_of_the_quotes_is_refused(config: dict, arguments: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        of_snakemake(config, arguments)


def test_the_scripts_read_as_snakemake_does() -> None:
    """`make plan` and the scripts join what a shell took apart."""
    text = "dictionary.k=[4, 8] corpus.path='/a b/c'"
    for argv in ([text], text.split(" "), shlex.split(shlex.quote(text))):
        assert split(" ".join(argv)) == split(text)
