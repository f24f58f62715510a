"""How many latents are looked up a second, and how fast their pages are: the stages `features` and `dashboards`.

Last line: {"latents_per_s", "seconds", "n_latents", "n_tokens", "bytes_per_latent", "peak_bytes",
"saedashboard_over_ours", "saedashboard_seconds", "alone_seconds", "dashboard_s", "first_open_bytes", "open_s",
"latent_s", "scroll_fps", "race_fps", "import_s"}; the five before the last are null without a Chromium.

Eight SAEs of the MLP's output of layer 3 and four transcoders, 1,024 latents each, with random encoders: TopK of k = 8,
16, 32 and 64, the others ReLU, of which 20 to 150 latents are active on a token. Everything that the stage
makes is made and written: pass, examples, logits, neighbours, ablations. The model is open before the clock starts.

`saedashboard_over_ours`: the seconds that SAEDashboard takes for the data of the pages of the first ReLU SAE on the
same tokens (`_saedashboard.py`, in a process of its own, installed into .venv-bench), over those that the stage takes
for that SAE alone. SAEDashboard makes no ablations, which ours are counted with, and correlations, which ours have not.
Null with --no-saedashboard, and where it cannot be installed.

Then a dashboard of one TopK SAE of 16,384 latents (`--wide`, k = 64) is made, and opened by file:// in a headless
Chromium: bytes of all files that it reads until table and overview are there, seconds of that (the median of five) and
from there to the page of a latent, and frames a second while 100 rows go by a second, and while all do in four.

`import_s`: of `import saeflow`, the median of five processes.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlparse

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--threads", type=int, default=2)
parser.add_argument("--tokens", type=int, default=65_536)
parser.add_argument("--wide", type=int, default=16_384, help="latents of the dictionary whose dashboard is opened")
parser.add_argument("--no-saedashboard", action="store_true", help="leave out what installs and runs SAEDashboard")
args = parser.parse_args()
os.environ.update({"OMP_NUM_THREADS": str(args.threads), "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"})
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # as the stage does
warnings.simplefilter("ignore")

import numpy as np  # noqa: E402 (after the number of threads is set)
import torch  # noqa: E402
from torch import Tensor  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests/dashboards")]

from browser import CHROMIUM, Opened, chromium  # noqa: E402
from stores import write_receipt  # noqa: E402

import saeflow.features.job as features  # noqa: E402
from saeflow.config import ModelConfig  # noqa: E402
from saeflow.dashboards.job import dashboard  # noqa: E402
from saeflow.dictionaries import Dictionary, Spec, save_dictionary  # noqa: E402
from saeflow.dictionaries.sae import build  # noqa: E402
from saeflow.jobs.job import Job  # noqa: E402
from saeflow.models.folder import model_digest  # noqa: E402
from saeflow.models.loading import load_model  # noqa: E402
from saeflow.models.splicing import read_hooks  # noqa: E402
from saeflow.planning.digests import DigestCache  # noqa: E402
from saeflow.planning.graph import Instance, Plan  # noqa: E402
from saeflow.text.corpus import read_documents  # noqa: E402
from saeflow.text.tokenizer import load_tokenizer, tokenizer_digest  # noqa: E402
from saeflow.text.tokens import open_tokens, write_tokens  # noqa: E402

MODEL, IN, OUT = ROOT / "resources/model", "blocks.3.ln2.hook_normalized", "blocks.3.hook_mlp_out"
D, N_LATENTS = 128, 1024
RELU = "4"  # the first SAE that is no TopK, which SAEDashboard cannot fold


def main() -> None:
    torch.set_num_threads(args.threads)
    model = load_model(MODEL, ModelConfig("embedded", path=str(MODEL)), "cpu")
    with tempfile.TemporaryDirectory() as folder:
        plan = planned(model, Path(folder))
        jobs = [Job(instance, plan, "cpu") for instance in plan.stages["features"].values()]
        features.open_model = lambda job: model
        start = time.perf_counter()
        indices = features.features_jobs(jobs)
        seconds = time.perf_counter() - start
        size = sum(file.stat().st_size for job in jobs for file in job.path.rglob("*") if file.is_file())
        seen = opened(plan, model)
    n = sum(index["n_latents"] for index in indices)
    found = {"latents_per_s": n / seconds, "seconds": seconds, "n_latents": n, "n_tokens": indices[0]["n_tokens"]}
    found |= {"bytes_per_latent": size / n, "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}
    print(json.dumps(found | beside_saedashboard(model) | seen | {"import_s": import_seconds()}))


def import_seconds() -> float:
    code = "import time; start = time.perf_counter(); import saeflow; print(time.perf_counter() - start)"
    run = [subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True) for _ in range(5)]
    return statistics.median(float(done.stdout) for done in run)


def beside_saedashboard(model: Any) -> dict[str, float | None]:
    """One dictionary by both."""
    nothing = dict.fromkeys(("saedashboard_over_ours", "saedashboard_seconds", "alone_seconds"))
    if args.no_saedashboard:
        return nothing
    from _peers import FOLDER, install

    try:
        install()
    except RuntimeError as error:
        print(error, file=sys.stderr)
        return nothing
    with tempfile.TemporaryDirectory() as folder:
        plan = planned(model, Path(folder))
        job = Job(plan.stages["features"][RELU], plan, "cpu")
        (sae,) = job.dictionaries()
        store = open_tokens(job.input("tokens"))
        np.save(Path(folder) / "tokens.npy", store[: store.n_rows].astype(np.int64))
        start = time.perf_counter()
        features.features_jobs([job])
        alone = time.perf_counter() - start
        script = str(ROOT / "benchmarks/_saedashboard.py")
        command = [sys.executable, script, str(sae), f"{folder}/tokens.npy", str(MODEL), str(args.threads)]
        path = os.pathsep.join([*filter(None, [os.environ.get("PYTHONPATH")]), str(FOLDER)])
        environment = os.environ | {"PYTHONPATH": path}
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment, check=True)
    theirs = float(done.stdout)
    return {"saedashboard_over_ours": theirs / alone, "saedashboard_seconds": theirs, "alone_seconds": alone}


# -------------------------------------------------------------------- pages
SCROLL = """pixels => new Promise(done => {
  const box = document.querySelector("#list .scroll"), start = performance.now();
  let frames = 0;
  const step = now => {
    if (now - start >= 4000) return done(frames / 4);
    box.scrollTop = (now - start) / 4000 * (pixels || box.scrollHeight);
    frames++;
    requestAnimationFrame(step);
  };
  requestAnimationFrame(step);
})"""


def opened(plan: Plan, model: Any) -> dict[str, Any]:
    """Makes a dashboard of a wide SAE, and opens it."""
    root = Path(plan.results)
    store = open_tokens(root / "tokens/held")
    rows = torch.from_numpy(store[:8].astype(np.int64))
    (values,) = read_hooks(model, rows, [OUT])
    add(plan, "wide", dictionary(3, {OUT: values[:, 1:].flatten(0, 1)}, args.wide))
    features.features_jobs([Job(plan.stages["features"]["wide"], plan, "cpu")])
    write_receipt(root / "features/wide")
    plan.stages["dashboards"] = {
        "wide": Instance("dashboards", "wide", {}, {"features": ["wide"], "train": ["wide"]}, {})
    }
    plan.stages["train"] = {"wide": Instance("train", "wide", {}, {}, {})}
    job = Job(plan.stages["dashboards"]["wide"], plan, "cpu")
    start = time.perf_counter()
    dashboard(job)
    found: dict[str, Any] = {"dashboard_s": time.perf_counter() - start}
    if CHROMIUM is None:
        print("no Chromium to open the page in: apt-get install chromium", file=sys.stderr)
        return found | dict.fromkeys(("first_open_bytes", "open_s", "latent_s", "scroll_fps", "race_fps"))
    page, times = job.path / "index.html", []
    with chromium() as browser:
        for _ in range(5):
            start = time.perf_counter()
            one = Opened(browser, page)
            one.page.wait_for_selector("#list tbody tr[data-row]")
            times.append(time.perf_counter() - start)
        files = {Path(unquote(urlparse(url).path)) for url in one.asked if url.startswith("file:")}
        start = time.perf_counter()
        one.page.click("#list tbody tr[data-row='3']")
        one.page.wait_for_selector("ol.examples")
        latent = time.perf_counter() - start
        scroll, race = (one.page.evaluate(SCROLL, pixels) for pixels in (4 * 100 * 30, 0))
    size = sum(file.stat().st_size for file in files)
    found |= {"first_open_bytes": size, "open_s": statistics.median(times)}
    return found | {"latent_s": latent, "scroll_fps": scroll, "race_fps": race}


def planned(model: Any, root: Path) -> Plan:
    """Tokens and dictionaries on disk, and the jobs that look their latents up."""
    digest = tokenizer_digest(MODEL, DigestCache(None))
    tokens = root / "tokens/held"
    tokens.mkdir(parents=True)
    documents = read_documents(ROOT / "resources/corpus.jsonl.gz")
    shape = {"n_rows": -(-args.tokens // 256), "context_size": 256, "prepend_bos": True, "held_out_fraction": 0.1}
    write_tokens(tokens, documents, load_tokenizer(MODEL), split="held_out", tokenizer_digest=digest, **shape)
    rows = torch.from_numpy(open_tokens(tokens)[:8].astype(np.int64))
    values = {
        hook: value[:, 1:].flatten(0, 1)
        for hook, value in zip((IN, OUT), read_hooks(model, rows, [IN, OUT]), strict=True)
    }
    plan = Plan("bench", {"features": {}}, {}, results=str(root))
    plan.stages["tokens"] = {"held": Instance("tokens", "held", {"tokenizer": digest}, {}, {})}
    write_receipt(tokens)
    for i in range(12):
        add(plan, f"{i}", dictionary(i, values))
    return plan


def add(plan: Plan, name: str, made: Dictionary) -> None:
    """Saves a dictionary, and plans its table."""
    folder = Path(plan.results) / "train" / name
    folder.mkdir(parents=True)
    save_dictionary(made, folder)
    write_receipt(folder)
    processing = {"fold_ln": False, "center_writing_weights": False, "center_unembed": False}
    weights = {"weights": model_digest(MODEL, DigestCache(None)), **processing}
    config = {"features": {"n_tokens": args.tokens}, "model": weights}
    needs = {"train": [name], "tokens": ["held"]}
    plan.stages["features"][name] = Instance("features", name, config, needs, {"model": str(MODEL)})


def dictionary(i: int, values: dict[str, Tensor], n: int = N_LATENTS) -> Dictionary:
    """Of `n` latents; `values` (N, d) of some tokens by hook."""
    g = torch.Generator().manual_seed(i)
    W_enc = torch.randn(D, n, generator=g) / D**0.5
    k = 8 << i if i < 4 else None
    hook = IN if i >= 8 else OUT
    kind, activation = ("transcoder" if i >= 8 else "sae"), ("topk" if k else "relu")
    spec = Spec(kind, activation, D, D, n, hook, OUT, k=k)
    share = np.linspace(0.02, 0.15, 8)[i - 4]  # of latents that are active on a token
    bias = torch.zeros(n) if k else -(values[hook] @ W_enc).quantile(1 - share, dim=0)
    return build(spec, W_enc, bias, W_enc.T.contiguous(), torch.zeros(D))


if __name__ == "__main__":
    sys.exit(main())
