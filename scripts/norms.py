"""Says where a model has massive activations and outlier dimensions, before anything is cached: by hook and layer.

python scripts/norms.py model=smollm2 corpus=local corpus.path=my.jsonl [--rows 16] [--to FOLDER]

The rows are the first of the held-out tokens of the plan. Columns: `median`, the median norm of tokens that are not the
first of their row; the mean norm of the `first` tokens, and the `largest` of the others, over it; the share of the
others' squares in the `outlier` dimension and in the `two_outliers` that have most of them; which `dimensions` these
are. A first token of over ten medians: training.exclude.positions=[0] evaluation.replace_first=false.
"""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from saeflow.config import ConfigError
from saeflow.planning.command import parser_of, plan_of, refusals
from saeflow.planning.graph import Instance

if TYPE_CHECKING:
    from torch import Tensor


def sample_tokens(instance: Instance, n_rows: int, work: Path) -> "Tensor":
    """The first rows (n_rows, P) of the tokens that the plan has, packed in a folder `work`."""
    import torch

    from saeflow.text.corpus import open_corpus
    from saeflow.text.tokenizer import load_tokenizer
    from saeflow.text.tokens import open_tokens, write_tokens

    corpus, packing, sources = instance.config["corpus"], instance.config["tokens"], instance.sources
    if "case" in corpus:
        raise ConfigError("a model whose algorithm is known reads rows of a case: there is no text to look at")
    documents = open_corpus(corpus, sources["corpus"] or None)
    tokenizer = load_tokenizer(sources["model"], packing["bos_token"], packing.get("eos_token"))
    sizes = {name: packing[name] for name in ("context_size", "prepend_bos", "held_out_fraction")}
    write_tokens(work, documents, tokenizer, split="held_out", n_rows=n_rows, tokenizer_digest="", **sizes)
    return torch.from_numpy(open_tokens(work)[:n_rows].astype("int64"))


def main() -> None:
    parser = parser_of(__doc__, "Hydra overrides, such as model=smollm2")
    parser.add_argument("--rows", type=int, default=16, help="of held-out tokens")
    parser.add_argument("--to", type=Path, help="folder to write norms.csv, .png and .pdf to")
    args = parser.parse_args()
    if args.rows < 1:
        parser.error(f"--rows {args.rows}: it must be at least 1")
    to = args.to and args.to.resolve()
    with refusals("norms"):
        plan, _ = plan_of(args)
        instance = next(i for i in plan.stages["tokens"].values() if i.config["split"] == "held_out")
        cached = next(iter(plan.stages["activations"].values()))
        from saeflow.activations.norms import PLACES, draw_norms, norms_by_layer
        from saeflow.models.folder import read_geometry
        from saeflow.models.loading import load_model
        from saeflow.models.opening import model_config

        folder = Path(instance.sources["model"])
        with TemporaryDirectory() as work:
            tokens = sample_tokens(instance, args.rows, Path(work))
        model = load_model(folder, model_config(folder, cached.config["model"]), "cpu", tokens.shape[1])
        there = read_geometry(folder).block_hooks()
        table = norms_by_layer(model, tokens, [place for place in PLACES if place in there])
    print(table.to_string(index=False, float_format=lambda value: f"{value:.3g}"))
    if to:
        import matplotlib

        from saeflow.figures.style import STYLE, save_figure

        to.mkdir(parents=True, exist_ok=True)
        with matplotlib.rc_context(STYLE):
            save_figure(draw_norms(table), table, to, "norms")
        print(f"wrote norms.csv, .png and .pdf to {to}/")


main()
