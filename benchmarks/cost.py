"""Whether the plan's cost model holds: studies of three small models are run, the time of a larger one is predicted.

GPT-NeoX models of random weights, `SIZES` wide, are cached, and TopK SAEs and transcoders of them are trained and
evaluated, in one results folder; before the last is run, `saeflow.planning.history.predict` says from the jobs of the
others what each stage will take. Last line: {"predicted_over_measured", "<stage>.predicted_over_measured"}, of the
seconds that jobs work, without what Snakemake and Python take to start.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SIZES = (192, 256, 320)  # d_model, of the studies that are measured
PREDICTED = 448
LAYERS, CONTEXT, TOKENS = 6, 128, 200_000
STAGES = ("activations", "train", "baseline", "evaluate")


def main() -> None:
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work)
        for width in (*SIZES, PREDICTED):
            make_model(folder / f"model-{width}", width)
        for width in SIZES:
            run(folder, width)
        predicted = prediction(folder, PREDICTED)
        measured = run(folder, PREDICTED)
    ratios = {f"{stage}.predicted_over_measured": predicted[stage] / measured[stage] for stage in STAGES}
    whole = sum(predicted.values()) / sum(measured.values())
    print(json.dumps({"predicted_over_measured": round(whole, 3)} | {k: round(v, 3) for k, v in ratios.items()}))


def make_model(folder: Path, width: int) -> None:
    """A Pythia of random weights, with the embedded model's tokenizer."""
    import shutil

    import torch
    from transformers import AutoTokenizer, GPTNeoXConfig, GPTNeoXForCausalLM

    embedded = ROOT / "resources/model"
    tokenizer = AutoTokenizer.from_pretrained(embedded)
    torch.manual_seed(0)
    config = GPTNeoXConfig(
        vocab_size=len(tokenizer), hidden_size=width, num_hidden_layers=LAYERS, num_attention_heads=width // 64,
        intermediate_size=4 * width, max_position_embeddings=CONTEXT, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    GPTNeoXForCausalLM(config).save_pretrained(folder)
    for file in embedded.glob("token*.json"):
        shutil.copy(file, folder)


def overrides(folder: Path, width: int) -> list[str]:
    sweep = "[{dictionary: topk, site: mlp_out, dictionary.k: [16, 32]}, {dictionary: transcoder_topk, site: mlp}]"
    return [
        f"experiment_name=cost_{width}", f"model.name=cost_{width}", f"model.path={folder}/model-{width}",
        f"tokens={{context_size: {CONTEXT}, train_tokens: {TOKENS}, held_out_tokens: {TOKENS // 8}}}",
        f"site.layer={LAYERS // 2}", "dictionary.expansion=16", f"training.n_tokens={2 * TOKENS}",
        "training.batch_size=2048", "figures=[sparsity_faithfulness]", f"sweep={sweep}",
    ]  # fmt: skip


def prediction(folder: Path, width: int) -> dict[str, float]:
    """Seconds of each stage that the plan of a width has still to do."""
    from saeflow.planning.expansion import compose
    from saeflow.planning.history import lines, predict

    results = str(folder / "results")
    found = predict(compose(ROOT / "conf", overrides(folder, width), results=results), lines(results)).by_stage
    return {stage: found[stage] for stage in STAGES}


def run(folder: Path, width: int) -> dict[str, float]:
    """Seconds that the jobs of each stage worked."""
    experiment = f"cost_{width}"
    command = [sys.executable, "-m", "snakemake", "-s", str(ROOT / "Snakefile"), "--directory", str(folder)]
    done = subprocess.run(
        [*command, "--cores", "1", "--config", f"hydra={' '.join(overrides(folder, width))}"],
        capture_output=True,
        text=True,
    )
    if done.returncode:
        sys.exit(f"{experiment} failed:\n{done.stdout}{done.stderr}")
    made = [json.loads(line) for line in (folder / "results/made.jsonl").read_text().splitlines()]
    own = [line for line in made if line["experiment"] == experiment]
    seconds = {stage: sum(line["seconds"] for line in own if line["stage"] == stage) for stage in STAGES}
    print(f"{experiment}: {', '.join(f'{s} {t:.1f} s' for s, t in seconds.items())}", file=sys.stderr)
    return seconds


main()
