"""A small language model that has to know which of two years is later: the task of the greater-than circuit (Hanna, Liu
and Variengien 2023, arXiv 2305.00586), which GPT-2 small knows from its text, and a model of this size does not.

It is trained on sentences such as "The war lasted from 1732 to 1741 ." in which the second year is drawn from those of
the century that are later than the first: all that can be known of it. Two digits are one token.
"""

from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

from saeflow.models.pretraining import EOS, PretrainConfig, split_documents, tokenise
from saeflow.text.corpus import Document

NOUNS = ("war", "siege", "reign", "truce", "famine", "trial", "voyage", "drought")
VERBS = ("lasted", "went on", "dragged on")
TEMPLATE = "The war lasted from 17{} to 17"
YEARS = tuple(f"{year:02d}" for year in range(100))
CONFIG = PretrainConfig(
    vocab_size=117, d_model=64, n_layers=2, n_heads=4, d_mlp=256, context_size=64, n_steps=1000, batch_rows=32
)
N_SENTENCES = 40_000


def tokenizer() -> Tokenizer:
    """Words apart by spaces, digits in twos."""
    words = dict.fromkeys([EOS, "The", *NOUNS, *" ".join(VERBS).split(), "from", "to", ".", *YEARS])
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=EOS))
    digits = pre_tokenizers.Split(Regex(r"\d\d"), "isolated")
    made.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), digits])
    made.decoder = decoders.WordPiece(prefix="")
    return made


def sentences(n: int, seed: int) -> list[str]:
    """The first year is drawn from those that have a later one, the second from the later ones, each alike."""
    rng = np.random.default_rng(seed)
    first = rng.integers(0, len(YEARS) - 1, n)
    second = rng.integers(first + 1, len(YEARS))
    nouns, verbs = rng.choice(NOUNS, n), rng.choice(VERBS, n)
    return [
        f"The {noun} {verb} from 17{YEARS[a]} to 17{YEARS[b]} ."
        for noun, verb, a, b in zip(nouns, verbs, first, second, strict=True)
    ]


def train(folder: Path, config: PretrainConfig = CONFIG, n_sentences: int = N_SENTENCES) -> dict[str, Any]:
    """Fills a Hugging Face folder with the trained model, and with its text, `sentences.txt`, a sentence a line.
    Returns the last row of its training curve."""
    from saeflow.models.pretraining import save_tokenizer, train_model

    made, text = tokenizer(), sentences(n_sentences, config.seed)
    sides = split_documents([Document(line, "sentences") for line in text], config.held_out_fraction)
    train_split, held_out = (tokenise(made, side, config.context_size) for side in sides)
    curve: list[dict[str, Any]] = []
    eos = made.token_to_id(EOS)
    assert eos is not None
    model: Any = train_model(config, train_split, held_out, eos, curve.append)
    folder.mkdir(parents=True, exist_ok=True)
    save_tokenizer(made, folder, config.context_size)
    model.save_pretrained(folder)
    (folder / "sentences.txt").write_text("".join(f"{line}\n" for line in text))
    return curve[-1]
