"""Trains the language model of resources/model from the corpus: a Hugging Face folder with its model card and curve."""

import argparse
import dataclasses
import shutil
from pathlib import Path

from saeflow.jobs.log import limit_threads, start_log
from saeflow.storage.publish import beside, publish

CARD = """# The embedded language model

A GPT-NeoX of {parameters:,} parameters ({n_layers} layers, d_model {d_model}, {n_heads} heads, d_mlp {d_mlp}, context
{context_size}, parallel attention and MLP, untied embeddings) with a byte-level BPE of {vocab_size:,} tokens, trained
from scratch on the documents of `resources/corpus.jsonl.gz` (Jane Austen's novels and the King James Bible, in the
public domain) that are not held out. {n_held_out} of {n_documents:,} documents are held out by the hash of their text
(`held_out_fraction` {held_out_fraction}); neither the tokenizer nor the model saw them.

| on the same {predictions:,} held-out predictions | nats per token |
|---|---|
| this model | {loss:.3f} |
| bigram, Witten-Bell | {bigram:.3f} |
| unigram | {unigram:.3f} |

Trained for {n_steps:,} steps of {batch_rows} rows of {context_size} tokens ({n_tokens:,} tokens, {epochs:.1f} passes):
Muon for the matrices of the blocks, AdamW for the rest, cosine decay, bfloat16 autocast; seed {seed}. The curve is
in `training_curve.csv`. It is made by `snakemake pretrain` (`scripts/pretrain.py`). It is a toy for testing
interpretability tools on, and knows two registers of English.

Samples at temperature 0.8, prompts in bold:

{samples}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--corpus", required=True)
    parser.add_argument("--out", required=True, type=Path, help="folder to write")
    parser.add_argument("--steps", type=int, help="fewer steps, for a try")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--log")
    args = parser.parse_args()
    start_log(args.log)
    limit_threads(args.threads)

    import pandas as pd

    from saeflow.models import pretraining as p
    from saeflow.text.corpus import read_documents

    config = p.PretrainConfig(**({"n_steps": args.steps} if args.steps else {}))
    documents = list(read_documents(args.corpus))
    texts, held_out_texts = p.split_documents(documents, config.held_out_fraction)
    tokenizer = p.train_tokenizer(texts, config.vocab_size)
    train, held_out = (p.tokenise(tokenizer, t, config.context_size) for t in (texts, held_out_texts))
    curve: list[dict] = []
    model = p.train_model(config, train, held_out, tokenizer.token_to_id(p.EOS), curve.append)
    prompts = ("It is a truth", "And the LORD said", "She had been")
    samples = [p.sample(model, tokenizer, prompt, 60, seed).replace("\n", " ") for seed, prompt in enumerate(prompts)]

    partial = beside(args.out)
    shutil.rmtree(partial, ignore_errors=True)
    p.save_tokenizer(tokenizer, partial, config.context_size)
    model.save_pretrained(partial)
    pd.DataFrame(curve).to_csv(partial / "training_curve.csv", index=False, float_format="%.4f")
    facts = dataclasses.asdict(config) | p.ngram_losses(train.stream, held_out.rows, config.vocab_size)
    facts |= {"loss": curve[-1]["held_out_loss"], "parameters": sum(q.numel() for q in model.parameters())}
    facts |= {"n_documents": len(documents), "n_held_out": len(held_out_texts), "n_tokens": curve[-1]["tokens"]}
    facts |= {"predictions": held_out.rows[:, 1:].size, "epochs": curve[-1]["tokens"] / train.stream.size}
    marked = (f"> **{prompt}**{sample[len(prompt) :]}" for prompt, sample in zip(prompts, samples, strict=True))
    (partial / "README.md").write_text(CARD.format(**facts, samples="\n\n".join(marked)))
    publish(partial, args.out)
    print(f"wrote a model of {facts['loss']:.3f} nats per held-out token to {args.out}/")


main()
