"""Trains the embedded language model: a GPT-NeoX of 1.8 M parameters on the embedded corpus.

Hidden matrices are trained by Muon (Jordan 2024), everything else by AdamW, in bfloat16 autocast with float32 weights.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from saeflow.jobs.progress import progress
from saeflow.text.corpus import Document, is_held_out
from saeflow.text.packing import Packer, encode_all

EOS = "<|endoftext|>"  # BOS too, as in Pythia


@dataclass(frozen=True)
class PretrainConfig:
    vocab_size: int = 4096
    d_model: int = 128
    n_layers: int = 4
    n_heads: int = 4
    d_mlp: int = 512
    context_size: int = 256
    held_out_fraction: float = 0.1
    n_steps: int = 3200
    batch_rows: int = 16
    muon_lr: float = 0.012
    adam_lr: float = 0.004
    weight_decay: float = 0.1
    warm_up_steps: int = 100
    final_lr_fraction: float = 0.0
    eval_every: int = 200
    curve_rows_step: int = 4
    """The curve measures every fourth held-out row; the last point, which the model card states, all of them."""
    seed: int = 0


@dataclass
class Split:
    """Token ids of one side: `stream` (tokens,) with documents joined by EOS, and `rows` (rows, context_size)."""

    stream: np.ndarray
    rows: np.ndarray


def train_tokenizer(texts: list[str], vocab_size: int) -> Tokenizer:
    """Byte-level BPE with `EOS` as its one special token, id 0."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def split_documents(documents: list[Document], fraction: float) -> tuple[list[str], list[str]]:
    """Texts of the training and of the held-out documents."""
    sides: tuple[list[str], list[str]] = ([], [])
    for document in documents:
        sides[is_held_out(document.text, fraction)].append(document.text)
    return sides


def tokenise(tokenizer: Tokenizer, texts: list[str], context_size: int) -> Split:
    """Token ids of some documents, as one stream for training and as packed rows for measuring."""
    eos = tokenizer.token_to_id(EOS)
    assert eos is not None
    packer = Packer(context_size, eos, eos)
    for i, ids in enumerate(encode_all(tokenizer, texts)):
        packer.add(i, ids)
    rows = packer.take().tokens
    return Split(rows[:, 1:].reshape(-1), rows)


def ngram_losses(train: np.ndarray, rows: np.ndarray, vocab_size: int) -> dict[str, float]:
    """Held-out nats per token of a unigram and of an interpolated bigram model, on the predictions that the LM makes.

    Unigram: add-one counts. Bigram: Witten-Bell, P(b|a) = (c(ab) + T(a) P(b)) / (c(a) + T(a)), T(a) the number of
    distinct successors of a.
    """
    unigram = (np.bincount(train, minlength=vocab_size) + 1) / (train.size + vocab_size)
    pairs = np.bincount(train[:-1].astype(np.int64) * vocab_size + train[1:], minlength=vocab_size**2)
    pairs = pairs.reshape(vocab_size, vocab_size)
    count, distinct = pairs.sum(1), (pairs > 0).sum(1)
    a, b = rows[:, :-1].reshape(-1), rows[:, 1:].reshape(-1)
    distinct = np.maximum(distinct, 1)  # a token without successors falls back on the unigram
    bigram = (pairs[a, b] + distinct[a] * unigram[b]) / (count[a] + distinct[a])
    return {"unigram": float(-np.log(unigram[b]).mean()), "bigram": float(-np.log(bigram).mean())}


@torch.no_grad()
def held_out_loss(model: torch.nn.Module, rows: np.ndarray, batch_rows: int = 32) -> float:
    """Mean nats per token over all predictions of the rows, the one made from BOS included, in float32."""
    model.eval()
    total = 0.0
    for i in range(0, len(rows), batch_rows):
        ids = torch.from_numpy(rows[i : i + batch_rows]).long()
        logits = model(input_ids=ids).logits[:, :-1]
        total += torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum").item()
    model.train()
    return total / (len(rows) * (rows.shape[1] - 1))


def train_model(
    config: PretrainConfig, train: Split, held_out: Split, bos: int, report: Callable[[dict], None]
) -> torch.nn.Module:
    """Returns the trained `GPTNeoXForCausalLM`; calls `report` with a row of the training curve every `eval_every`."""
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    torch.manual_seed(config.seed)
    model = GPTNeoXForCausalLM(
        GPTNeoXConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.d_model,
            num_hidden_layers=config.n_layers,
            num_attention_heads=config.n_heads,
            intermediate_size=config.d_mlp,
            max_position_embeddings=config.context_size,
            rotary_pct=0.25,
            use_parallel_residual=True,
            bos_token_id=bos,
            eos_token_id=bos,
            tie_word_embeddings=False,
        )
    )
    hidden = [p for n, p in model.named_parameters() if p.ndim == 2 and ".layers." in n]
    rest = [p for n, p in model.named_parameters() if not (p.ndim == 2 and ".layers." in n)]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.Muon(hidden, lr=config.muon_lr, weight_decay=config.weight_decay, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=config.adam_lr, betas=(0.9, 0.95), weight_decay=config.weight_decay, fused=True),
    ]
    peaks = [config.muon_lr, config.adam_lr]
    rng = np.random.default_rng(config.seed)
    body = config.context_size - 1
    running = 0.0
    for step in progress(range(config.n_steps), "pretraining", unit="steps"):
        for optimizer, peak in zip(optimizers, peaks, strict=True):
            optimizer.param_groups[0]["lr"] = peak * _schedule(step, config)
        starts = rng.integers(0, train.stream.size - body, config.batch_rows)
        windows = torch.from_numpy(train.stream[starts[:, None] + np.arange(body)]).long()
        ids = torch.nn.functional.pad(windows, (1, 0), value=bos)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = model(input_ids=ids).logits
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(rest, 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        running += loss.item()
        last = step + 1 == config.n_steps
        if (step + 1) % config.eval_every == 0 or last:
            since = (step % config.eval_every) + 1
            rows = held_out.rows if last else held_out.rows[:: config.curve_rows_step]
            point = {"step": step + 1, "tokens": (step + 1) * ids.numel(), "train_loss": running / since}
            report(point | {"held_out_loss": held_out_loss(model, rows)})
            running = 0.0
    return model


def _schedule(step: int, config: PretrainConfig) -> float:
    """Linear warm-up, then cosine decay to `final_lr_fraction` of the peak."""
    if step < config.warm_up_steps:
        return (step + 1) / config.warm_up_steps
    progress = (step - config.warm_up_steps) / max(1, config.n_steps - config.warm_up_steps)
    return config.final_lr_fraction + (1 - config.final_lr_fraction) * 0.5 * (1 + math.cos(math.pi * progress))


def sample(model: torch.nn.Module, tokenizer: Tokenizer, prompt: str, n_tokens: int, seed: int) -> str:
    """Continues `prompt` at temperature 0.8."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.tensor([[tokenizer.token_to_id(EOS), *tokenizer.encode(prompt, add_special_tokens=False).ids]])
    with torch.no_grad():
        for _ in range(n_tokens):
            probabilities = (model(input_ids=ids).logits[0, -1] / 0.8).softmax(-1)
            ids = torch.cat([ids, torch.multinomial(probabilities, 1, generator=generator)[None]], dim=1)
    return tokenizer.decode(ids[0, 1:].tolist())


def save_tokenizer(tokenizer: Tokenizer, folder: Path, context_size: int) -> None:
    """Writes the tokenizer files of a Hugging Face folder."""
    from transformers import PreTrainedTokenizerFast

    names = dict.fromkeys(("bos_token", "eos_token", "unk_token"), EOS)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names, model_max_length=context_size)
    fast.save_pretrained(folder)
