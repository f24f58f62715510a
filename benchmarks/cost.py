"""Whether the plan's cost model holds: what earlier jobs took predicts what later, larger ones take.

`widths`: GPT-NeoX models of random weights, `SIZES` wide, are cached, and TopK SAEs and transcoders of them are trained
and evaluated, in one results folder; before the last is run, `saeflow.planning.history.predict` says from the jobs of
the others what each stage will take. `experiments`: the demo is run with fewer tokens (`SMALLER`), then as it is, then
sparsity_faithfulness, and each of these two is predicted from all before it.

Last line: {"predicted_over_measured", "<stage>.predicted_over_measured"}, of the seconds that jobs of the widths work,
without what Snakemake and Python take to start; and {"<experiment>.<stage>.<of>.predicted_over_measured",
"<experiment>.within_30_percent"}, of `seconds` (wall), `cpu_s` (of all cores: what to judge by where the machine is
loaded) and `memory` (of the largest job), and which share of the latter two is within 30 %. `--only` takes one of the
two, `--fraction` runs the experiments on so much of their tokens.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
SIZES = (192, 256, 320)  # d_model, of the studies that are measured
PREDICTED = 448
LAYERS, CONTEXT, TOKENS = 6, 128, 200_000
STAGES = ("activations", "train", "baseline", "evaluate")
EXPERIMENTS = ("demo", "sparsity_faithfulness")
SMALLER = (0.5, 0.75)  # of the demo's tokens
SIZED = {"tokens.train_tokens": 307_200, "tokens.held_out_tokens": 65_536, "training.n_tokens": 614_400}
SIZED |= {"features.n_tokens": 16_384, "jacobian.n_tokens": 16_384}
SIZED |= {"training.lr_warm_up_steps": 50, "training.lr_decay_steps": 150, "training.l1_warm_up_steps": 100}
"""Schedules too: while an L1 coefficient rises, more latents are active and a step takes longer."""
TOLERANCE = 0.3
MEASURES = ("seconds", "cpu_s", "memory")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=("widths", "experiments"))
    parser.add_argument("--fraction", type=float, default=1.0)
    args = parser.parse_args()
    found: dict[str, float] = {}
    for name, measure in (("widths", of_widths), ("experiments", lambda f: of_experiments(f, args.fraction))):
        if args.only in (None, name):
            with tempfile.TemporaryDirectory() as work:
                found |= measure(Path(work))
    print(json.dumps({name: round(value, 3) for name, value in found.items()}))


# -------------------------------------------------------------------- models of several widths
def of_widths(folder: Path) -> dict[str, float]:
    for width in (*SIZES, PREDICTED):
        make_model(folder / f"model-{width}", width)
    for width in SIZES:
        run(folder, f"cost_{width}", overrides(folder, width))
    predicted = prediction(folder, overrides(folder, PREDICTED))
    measured = run(folder, f"cost_{PREDICTED}", overrides(folder, PREDICTED))
    pairs = {stage: (predicted[stage]["seconds"], measured[stage]["seconds"]) for stage in STAGES}
    whole = sum(p for p, _ in pairs.values()) / sum(m for _, m in pairs.values())
    return {"predicted_over_measured": whole} | {f"{s}.predicted_over_measured": p / m for s, (p, m) in pairs.items()}


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


# -------------------------------------------------------------------- the experiments on the embedded model
def of_experiments(folder: Path, fraction: float) -> dict[str, float]:
    for part in SMALLER:
        name = f"demo_{100 * part:.0f}"
        run(folder, name, ["experiment=demo", f"experiment_name={name}", *sizes("demo", part * fraction)])
    found: dict[str, float] = {}
    for name in EXPERIMENTS:
        smaller = [] if fraction == 1 else sizes(name, fraction)
        predicted = prediction(folder, [f"experiment={name}", *smaller])
        measured = run(folder, name, [f"experiment={name}", *smaller])
        ratios = {
            f"{stage}.{of}": predicted[stage][of] / measured[stage][of]
            for stage in measured
            for of in MEASURES
            if of in predicted[stage]
        }
        judged = [1 - TOLERANCE <= ratio <= 1 + TOLERANCE for of, ratio in ratios.items() if not of.endswith("seconds")]
        found |= {f"{name}.{of}.predicted_over_measured": ratio for of, ratio in ratios.items()}
        found[f"{name}.within_30_percent"] = sum(judged) / len(judged)
    return found


def sizes(experiment: str, fraction: float) -> list[str]:
    of_it = (path for path in SIZED if experiment == "demo" or path.startswith(("tokens", "training")))
    return [f"{path}={round(fraction * SIZED[path])}" for path in of_it]


# -------------------------------------------------------------------- both
def prediction(folder: Path, hydra: list[str]) -> dict[str, dict[str, float]]:
    """Of each stage that a plan has still to do: seconds, by what earlier jobs took of the clock and of all cores, and
    MB of memory of the largest job."""
    from saeflow.planning.expansion import compose
    from saeflow.planning.history import lines, predict

    results = str(folder / "results")
    plan, made = compose(ROOT / "conf", hydra, results=results), lines(results)
    by_clock, by_cores = predict(plan, made), predict(plan, [line | {"seconds": line["cpu_s"]} for line in made])
    return {
        stage: {"seconds": seconds, "cpu_s": by_cores.by_stage[stage]}
        | ({"memory": by_clock.memory_mb[stage]} if stage in by_clock.memory_mb else {})
        for stage, seconds in by_clock.by_stage.items()
    }


def run(folder: Path, experiment: str, hydra: list[str]) -> dict[str, dict[str, float]]:
    """The same of each stage, as it was: what its jobs worked, and what the largest of them had."""
    command = [sys.executable, "-m", "snakemake", "-s", str(ROOT / "Snakefile"), "--directory", str(folder)]
    done = subprocess.run(
        [*command, "--cores", "1", "--config", f"hydra={' '.join(hydra)}"], capture_output=True, text=True
    )
    if done.returncode:
        sys.exit(f"{experiment} failed:\n{done.stdout}{done.stderr}")
    made = [json.loads(line) for line in (folder / "results/made.jsonl").read_text().splitlines()]
    found: dict[str, dict[str, Any]] = {}
    for line in (line for line in made if line["experiment"] == experiment):
        one = found.setdefault(line["stage"], dict.fromkeys(MEASURES, 0.0))
        one["seconds"] += line["seconds"]
        one["cpu_s"] += line["cpu_s"]
        one["memory"] = max(one["memory"], line["peak_mb"])
    told = (f"{stage} {one['seconds']:.1f} s ({one['cpu_s']:.1f} s of cores)" for stage, one in found.items())
    print(f"{experiment}: {', '.join(told)}", file=sys.stderr)
    return found


main()
