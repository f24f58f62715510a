"""Caching against the bare forward pass and against SAELens, on the same model, tokens and threads.

Last line: {"forward_over_caching", "saelens_over_caching", "bytes_per_token_over_ideal", "peak_memory_ratio", ...}.

forward_over_caching: time of the model up to the same layer, as TransformerLens runs it and keeping nothing, over the
time of caching, which adds statistics, checksums and writing; both from tokens on disk. Caching runs attention fused,
so fused_forward_over_caching gives the same against a forward pass that does so too. saelens_over_caching: time of
SAELens's CacheActivationsRunner (float32, one hook, no statistics, no checksums) over that of caching. Medians of
alternating runs; that both caches hold the same values is checked. peak_memory_ratio: growth of the memory in use at
the peak when four times as many tokens are cached, over the growth for one times, each in a process of its own.
"""

import argparse
import json
import logging
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=ROOT / "resources/model", help="Hugging Face folder")
    parser.add_argument("--hook", default="blocks.2.hook_mlp_out")
    parser.add_argument("--tokens", type=int, default=131_072)
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--batch-rows", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--peak-memory-of", type=int, metavar="TOKENS", help="only cache, and print the growth in KiB")
    return parser.parse_args()


args = parse()
os.environ.update({"OMP_NUM_THREADS": str(args.threads), "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"})
warnings.simplefilter("ignore")

import torch  # noqa: E402 (after the number of threads is set)

from saeflow.activations.caching import cache  # noqa: E402
from saeflow.activations.reader import open_rows  # noqa: E402
from saeflow.activations.store import ActivationStore, Column, TokenRows  # noqa: E402
from saeflow.activations.writer import ColumnRequest  # noqa: E402
from saeflow.config import ActivationsConfig, ModelConfig  # noqa: E402
from saeflow.models.attention import fused_attention  # noqa: E402
from saeflow.models.folder import hook_layer, read_geometry  # noqa: E402
from saeflow.models.loading import load_model  # noqa: E402


def main() -> None:
    torch.set_num_threads(args.threads)
    model = load_model(args.model, ModelConfig(name="benchmark", path=str(args.model)), "cpu")
    with tempfile.TemporaryDirectory(prefix="saeflow-bench-") as directory:
        folder = Path(directory)
        n_tokens = args.peak_memory_of or args.tokens
        write_tokens(folder, n_tokens // args.context)
        rows = TokenRows(folder)
        hook = ColumnRequest(args.hook, read_geometry(args.model).hook_size(args.hook), rows.n_rows * args.context)
        if args.peak_memory_of:
            Path("/proc/self/clear_refs").write_text("5")  # the peak begins here
            before = memory_kib("VmRSS")
            ours(folder / "store", model, rows, hook)
            print(memory_kib("VmHWM") - before)
            return
        report(folder, model, rows, hook)


def report(folder: Path, model: Any, rows: TokenRows, hook: ColumnRequest) -> None:
    sides: dict[str, Callable[[], Any]] = {
        "forward": lambda: bare_forward(model, rows),
        "fused_forward": lambda: fused_forward(model, rows),
        "caching": lambda: ours(folder / "store", model, rows, hook),
        "saelens": lambda: saelens(folder / "saelens", model, rows),
    }
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for repeat in range(args.repeats + 1):  # the first is warming up
        for name, side in sides.items():
            started = time.perf_counter()
            result = side()
            took = time.perf_counter() - started
            say(f"repeat {repeat} {name}: {took:.2f} s, {hook.n_tokens / took:,.0f} tokens/s")
            if repeat:
                seconds[name].append(took)
            if name == "saelens" and repeat == 0:
                check_same(folder / "store", hook, result)
    stored = sum(p.stat().st_size for p in (folder / "store").rglob("*") if p.is_file() and p.parent.name != "progress")
    ideal = hook.n_tokens * 4 * int(torch.tensor(hook.size).prod())
    growth = {n: peak_growth(n) for n in (args.tokens, 4 * args.tokens)}
    median = {name: statistics.median(values) for name, values in seconds.items()}
    found = {
        "forward_over_caching": median["forward"] / median["caching"],
        "fused_forward_over_caching": median["fused_forward"] / median["caching"],
        "saelens_over_caching": median["saelens"] / median["caching"],
        "bytes_per_token_over_ideal": stored / ideal,
        "peak_memory_ratio": growth[4 * args.tokens] / growth[args.tokens],
        "peak_memory_growth_mib": growth[4 * args.tokens] / 1024,
        "tokens_per_s": hook.n_tokens / median["caching"],
    }
    print(json.dumps({name: round(value, 4) for name, value in found.items()}))


# -------------------------------------------------------------------- the three sides
def bare_forward(model: Any, rows: TokenRows) -> None:
    """The model up to the hook's block, in the batches that caching uses, and nothing else."""
    stop = hook_layer(args.hook, model.cfg.n_layers)
    with torch.inference_mode():
        for first in range(0, rows.n_rows, args.batch_rows):
            tokens = torch.from_numpy(rows.tokens(first, min(first + args.batch_rows, rows.n_rows))).long()
            model(tokens, return_type=None, stop_at_layer=stop)


def fused_forward(model: Any, rows: TokenRows) -> None:
    with fused_attention(model):
        bare_forward(model, rows)


def ours(folder: Path, model: Any, rows: TokenRows, hook: ColumnRequest) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    store = ActivationStore(folder, ActivationsConfig(batch_rows=args.batch_rows))
    with store.locked():
        cache(store, [hook], rows, lambda: model)


def saelens(folder: Path, model: Any, rows: TokenRows) -> Any:
    """SAELens's runner on the loaded model and the packed rows; returns its data set."""
    import datasets
    import sae_lens.cache_activations_runner as runner

    logging.getLogger("sae_lens").setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    shutil.rmtree(folder, ignore_errors=True)
    n_tokens = rows.n_rows * args.context
    tokens = rows.tokens(0, rows.n_rows).tolist()
    config = runner.CacheActivationsRunnerConfig(
        dataset_path="",
        model_name="",
        model_batch_size=args.batch_rows,
        hook_name=args.hook,
        d_in=int(model.cfg.d_model),
        training_tokens=n_tokens,
        context_size=args.context,
        new_cached_activations_path=str(folder),
        shuffle=False,
        device="cpu",
        buffer_size_gb=n_tokens * int(model.cfg.d_model) * 4 / 1e9 / 4 * 1.0001,  # four buffers: none overshoots
        prepend_bos=False,  # the rows have theirs
        streaming=False,
    )
    runner.load_model = lambda **_: model
    return runner.CacheActivationsRunner(config, override_dataset=datasets.Dataset.from_dict({"tokens": tokens})).run()


# -------------------------------------------------------------------- helpers
def write_tokens(folder: Path, n_rows: int) -> None:
    """Packed rows of the embedded corpus, repeated if it is too short: what they say does not change the time."""
    from itertools import cycle

    from saeflow.text.corpus import read_documents
    from saeflow.text.tokenizer import load_tokenizer
    from saeflow.text.tokens import write_tokens

    documents = cycle(list(read_documents(ROOT / "resources/corpus.jsonl.gz")))
    write_tokens(
        folder,
        documents,
        load_tokenizer(args.model),
        split="train",
        n_rows=n_rows,
        context_size=args.context,
        prepend_bos=True,
        held_out_fraction=0.1,
        tokenizer_digest="benchmark",
    )


def check_same(store: Path, hook: ColumnRequest, dataset: Any) -> None:
    """Both caches hold every token once, with the same values up to rounding."""
    import numpy as np

    column = Column(store / "column", hook.hook_name, hook.n_tokens, hook.size, "float32")
    mine = open_rows(column).take(np.arange(hook.n_tokens))
    theirs = torch.from_numpy(np.concatenate([np.asarray(row) for row in dataset.with_format("numpy")[hook.hook_name]]))
    torch.testing.assert_close(theirs.reshape(mine.shape), mine, rtol=1e-4, atol=1e-5)
    say(f"both caches hold the same {hook.n_tokens:,} x {mine.shape[1]} values")


def peak_growth(tokens: int) -> int:
    """Growth of the peak memory of a fresh process that caches so many tokens, in KiB."""
    options = ["--model", args.model, "--hook", args.hook, "--context", args.context, "--batch-rows", args.batch_rows]
    command = [sys.executable, __file__, *options, "--threads", args.threads, "--peak-memory-of", tokens]
    done = subprocess.run([str(part) for part in command], stdout=subprocess.PIPE, text=True, check=True)
    growth = int(done.stdout.splitlines()[-1])
    say(f"caching {tokens:,} tokens: peak memory grows by {growth / 1024:.0f} MiB")
    return growth


def memory_kib(field: str) -> int:
    """Of this process, by Linux: VmRSS is what it uses now, VmHWM the most that it used."""
    status = Path("/proc/self/status").read_text()
    return int(status.split(f"{field}:")[1].split()[0])


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


main()
