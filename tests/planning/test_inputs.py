"""What comes from outside is refused by the plan where no job could use it, in a sentence that says what to do."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from conftest import write_plain_model, write_weights

from saeflow.config import ConfigError
from saeflow.planning.expansion import compose
from saeflow.planning.graph import Plan

ROOT = Path(__file__).resolve().parents[2]
CONFIG = {
    "architectures": ["GPTNeoXForCausalLM"],
    "num_hidden_layers": 2,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
TINY = [
    "model=local",
    "site.layer=0",
    "tokens.context_size=32",
    "tokens.train_tokens=2048",
    "tokens.held_out_tokens=256",
    "training.n_tokens=2048",
    "training.batch_size=256",
    "figures=[]",
]


def plan_of(folder: Path, *overrides: str) -> Plan:
    return compose(ROOT / "conf", [*TINY, f"model.path={folder}", *overrides], results=str(folder / "results"))


def plan_of_text(home: Path, corpus: Path, *overrides: str) -> Plan:
    folder = write_plain_model(home / "m", CONFIG)
    return plan_of(folder, "corpus=local", f"corpus.path={corpus}", *overrides)


def write_records(file: Path, n: int, n_words: int = 40, field: str = "text") -> Path:
    file.write_text("".join(json.dumps({field: f"{i} " * n_words}) + "\n" for i in range(n)))
    return file


def add_token(folder: Path, i: int) -> Path:
    """The folder with one more token, `[PAD]`."""
    keys = json.loads((folder / "tokenizer.json").read_text())
    keys["added_tokens"] = [*keys.get("added_tokens", []), {"id": i, "content": "[PAD]"}]
    (folder / "tokenizer.json").write_text(json.dumps(keys))
    return folder


# -------------------------------------------------------------------- tokenizers
def test_a_tokenizer_with_more_tokens_than_the_embedding_is_refused(tmp_path: Path) -> None:
    plan_of(add_token(write_plain_model(tmp_path / "padded", CONFIG), 299))  # an embedding may be larger
    folder = add_token(write_plain_model(tmp_path / "m", CONFIG), 300)
    message = (
        r"1 tokens beyond the model's vocabulary: the id of '\[PAD\]' is 300, and the embedding has 300 rows; take"
    )
    with pytest.raises(ConfigError, match=message):
        plan_of(folder)


def test_every_layout_of_a_vocabulary_is_read(tmp_path: Path) -> None:
    folder = write_plain_model(tmp_path / "m", CONFIG, bos_token="b", eos_token={"content": "b"})
    (folder / "tokenizer.json").write_text(json.dumps({"model": {"vocab": [["a", -1.0], ["b", -2.0]]}}))
    plan_of(folder)
    (folder / "tokenizer.json").write_text(json.dumps({"model": {"vocab": [["b", 0.0]] * 301}}))
    with pytest.raises(ConfigError, match="the id of 'b' is 300"):
        plan_of(folder)
    (folder / "tokenizer.json").write_text("[]")
    with pytest.raises(ConfigError, match=r"tokenizer.json holds a list where keys should be"):
        plan_of(folder)
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"tokenizer.json holds no vocabulary"):
        plan_of(folder)


@pytest.mark.parametrize(
    ("names", "overrides", "message"),
    [
        (
            {"bos_token": None},
            [],
            "no BOS: name the token to use with tokens.bos_token, or set tokens.prepend_bos=false",
        ),
        ({"bos_token": None}, ["tokens.bos_token=z"], "tokens.bos_token='z' is not in the vocabulary"),
        ({"eos_token": None}, [], "names no eos_token.* name the token to use with tokens.eos_token"),
        (
            {"eos_token": "<|im_end|>"},
            [],
            r"eos_token='<\|im_end\|>' is not in .*name one that is with tokens.eos_token",
        ),
        ({}, ["tokens.eos_token=z"], "tokens.eos_token='z' is not in the vocabulary"),
    ],
)
def test_special_tokens_that_are_not_there_are_refused(
    tmp_path: Path, names: dict[str, Any], overrides: list[str], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        plan_of(write_plain_model(tmp_path / "m", CONFIG, **names), *overrides)


@pytest.mark.parametrize(
    ("names", "overrides"),
    [
        ({"bos_token": None}, ["tokens.bos_token=a"]),
        ({"bos_token": None}, ["tokens.prepend_bos=false"]),
        ({"eos_token": None}, ["tokens.eos_token=a"]),
        ({"eos_token": "<nope>"}, ["tokens.eos_token=a"]),
    ],
)
def test_special_tokens_can_be_named(tmp_path: Path, names: dict[str, Any], overrides: list[str]) -> None:
    plan = plan_of(write_plain_model(tmp_path / "m", CONFIG, **names), *overrides)
    assert len(plan.stages["tokens"]) == 2


def test_a_named_eos_is_in_the_keys_and_its_default_is_not(tmp_path: Path) -> None:
    folder = write_plain_model(tmp_path / "m", CONFIG)
    plain, named = plan_of(folder), plan_of(folder, "tokens.eos_token=a")
    assert plan_of(folder, "tokens.eos_token=null") == plain
    for stage in ("tokens", "activations", "train", "evaluate"):
        assert plain.stages[stage] and not plain.stages[stage].keys() & named.stages[stage].keys()
    assert all("eos_token" not in i.config["tokens"] for i in plain.stages["tokens"].values())
    assert {i.config["tokens"]["eos_token"] for i in named.stages["tokens"].values()} == {"a"}


# -------------------------------------------------------------------- models
def test_centering_with_rms_norm_is_refused(tmp_path: Path) -> None:
    folder = write_plain_model(tmp_path / "m", CONFIG | {"architectures": ["LlamaForCausalLM"]})
    plan_of(folder)
    with pytest.raises(
        ConfigError, match=r"center_writing_weights=true does not apply .*set model.center_writing_weights"
    ):
        plan_of(folder, "model.center_writing_weights=true")


def test_weights_that_are_not_whole_are_refused(tmp_path: Path) -> None:
    folder = write_plain_model(tmp_path / "m", CONFIG)
    weights = folder / "model.safetensors"
    held = weights.read_bytes()
    weights.write_bytes(held[:-1])
    with pytest.raises(ConfigError, match=r"are not whole: model.safetensors has .*copy the model folder again"):
        plan_of(folder)
    weights.unlink()
    write_weights(folder / "model-00001-of-00002.safetensors", {"gpt_neox.embed_in.weight": (300, 1)})
    shards = {"gpt_neox.embed_in.weight": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    with pytest.raises(ConfigError, match=r"names 1 files that are not there, model-00002-of-00002.safetensors first"):
        plan_of(folder)


def test_a_relative_path_says_where_it_begins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(write_plain_model(tmp_path / "a" / "m", CONFIG), tmp_path / "b" / "n")
    monkeypatch.chdir(tmp_path / "b")
    plan_of(Path("n"))
    with pytest.raises(ConfigError, match=rf"model.path=m: no such folder in {tmp_path}/b, where the run is"):
        plan_of(Path("m"))
    with pytest.raises(ConfigError, match=rf"model.path={tmp_path}/m: no such folder$"):
        plan_of(tmp_path / "m")


# -------------------------------------------------------------------- corpora
def test_a_corpus_that_is_long_enough_passes(tmp_path: Path) -> None:
    assert len(plan_of_text(tmp_path, write_records(tmp_path / "c.jsonl", 100)).stages["tokens"]) == 2


def test_a_wrong_text_field_is_refused_with_those_that_are_there(tmp_path: Path) -> None:
    file = write_records(tmp_path / "c.jsonl", 100, field="content")
    with pytest.raises(ConfigError, match=r"c.jsonl, line 1: no field 'text'; set corpus.text_field to one of content"):
        plan_of_text(tmp_path, file)
    plan_of_text(tmp_path, file, "corpus.text_field=content")


@pytest.mark.parametrize("sample_by", ["document", "paragraph"])
def test_one_book_is_refused_until_it_is_many_documents(tmp_path: Path, sample_by: str) -> None:
    (tmp_path / "book.txt").write_text("\n\n".join(f"Chapter {i} " + "and so on " * 30 for i in range(100)))
    overrides = [f"corpus.sample_by={sample_by}"]
    if sample_by == "document":
        message = (
            r"book.txt is one document, .* none is (held out|trained on); set corpus.sample_by=paragraph \(or line\)"
        )
        with pytest.raises(ConfigError, match=message):
            plan_of_text(tmp_path, tmp_path / "book.txt", *overrides)
    else:
        plan_of_text(tmp_path, tmp_path / "book.txt", *overrides)


def test_a_corpus_of_one_long_record_is_refused_too(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"c.jsonl is one document, .*use more documents, or another tokens.held_out_fr"
    ):
        plan_of_text(tmp_path, write_records(tmp_path / "c.jsonl", 1, 10_000))


def test_the_plan_and_the_job_agree_on_what_is_too_short(tmp_path: Path) -> None:
    """The most rows that the job can write are let through by the plan, and one more is refused by both alike."""
    from saeflow.text.corpus import CorpusError, read_documents
    from saeflow.text.tokenizer import load_tokenizer
    from saeflow.text.tokens import write_tokens

    file = write_records(tmp_path / "c.jsonl", 90)
    folder = write_plain_model(tmp_path / "m", CONFIG)

    def write(n_rows: int) -> None:
        write_tokens(
            tmp_path / f"out{n_rows}",
            read_documents(file),
            load_tokenizer(folder),
            split="train",
            n_rows=n_rows,
            context_size=32,
            prepend_bos=True,
            held_out_fraction=0.1,
            tokenizer_digest="",
        )

    with pytest.raises(CorpusError, match=r"set tokens.train_tokens=") as said:
        write(10_000)
    most = int(str(said.value).split("tokens.train_tokens=")[1].split()[0]) // 32
    write(most)
    plan_of_text(tmp_path, file, f"tokens.train_tokens={32 * most}", "training.n_tokens=512")
    for refuse in (
        lambda: write(most + 1),
        lambda: plan_of_text(tmp_path, file, f"tokens.train_tokens={32 * most + 32}"),
    ):
        with pytest.raises(
            ConfigError, match=f"the train split holds .* {most} rows of 32, but {most + 1} rows are asked"
        ):
            refuse()


def test_a_corpus_without_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "c.jsonl").write_text('{"text": null}\n{"text": " "}\n')
    with pytest.raises(
        ConfigError, match=r"c.jsonl is empty: none of its 2 records holds any text in corpus.text_field=text"
    ):
        plan_of_text(tmp_path, tmp_path / "c.jsonl")


def test_the_look_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from saeflow.text import look

    monkeypatch.setattr(look, "LOOK_RECORDS", 50)
    file = write_records(tmp_path / "c.jsonl", 100)
    file.write_text(file.read_text() + "no JSON, far beyond\n")
    plan_of_text(tmp_path, file)
    file.write_text("no JSON\n" + file.read_text())
    with pytest.raises(ConfigError, match=r"line 1: not a JSON object"):
        plan_of_text(tmp_path, file)


def test_what_of_a_folder_is_not_read_is_said_and_is_not_in_the_keys(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    write_records(folder / "a.jsonl", 100)
    plain = plan_of_text(tmp_path, folder)
    assert not caplog.records
    (folder / "README.txt").write_text("About these texts")
    (folder / "b.jsonl.bz2").write_bytes(b"BZh9")
    again = plan_of_text(tmp_path, folder)
    assert again.stages["tokens"].keys() == plain.stages["tokens"].keys()
    assert "not read: README.txt (not text of a corpus); b.jsonl.bz2 (unknown format)" in caplog.text
    write_records(tmp_path / "c.jsonl", 10)
    (folder / "linked.jsonl").symlink_to(tmp_path / "c.jsonl")
    assert not plan_of_text(tmp_path, folder).stages["tokens"].keys() & plain.stages["tokens"].keys()
