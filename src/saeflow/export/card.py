"""The `README.md` of an export: what is in it, made of what, how good it is, and how it is opened. Of a release on
Hugging Face it is the model card.

Names of models, corpora and experiments may hold anything: they stand in code spans, and the front matter is dumped by
Hugging Face's own class.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import yaml

from saeflow.config.checks import escape_controls
from saeflow.dictionaries.naming import amount_name, series_name
from saeflow.dictionaries.settings import differing
from saeflow.export.formats import Format
from saeflow.export.subjects import Subject

METRICS = {
    "l0": "L0",
    "explained_variance": "explained variance",
    "ce_increase": "rise in loss, nats",
    "loss_recovered_mean": "loss recovered, against mean ablation",
    "loss_recovered_zero": "against zero ablation",
}
"""Of the evaluation, in the table of the dictionaries."""
TAGS = ["sparse-autoencoder", "mechanistic-interpretability", "saeflow"]
NO_LICENCE = "Nothing is said of it: whoever publishes this folder names one with `make export … LICENSE=…`."


def model_card(form: Format, subjects: Sequence[Subject], about: Mapping[str, Any], licence: str | None) -> str:
    """`about`: what `export.json` says. `licence`: an identifier as Hugging Face has them, such as `cc-by-4.0`."""
    from huggingface_hub import ModelCardData

    data = ModelCardData(license=licence or None, library_name=form.library, tags=[*TAGS, form.name])
    common, varying = _settings(subjects)
    names = {subject.name: about["entries"][subject.name] for subject in subjects}
    first = next(iter(names.values()))[0]
    lines = [
        f"---\n{data.to_yaml()}\n---",
        f"# Dictionaries of {code(_names(subjects, 'model.name'))}, experiment {code(about['experiment'])}",
        f"{form.about[0].upper()}{form.about[1:]}; written by saeflow (`make export FORMAT={form.name}`).",
        "## What is in it",
        _table(subjects, names),
        _evaluated(subjects),
        *([_left_out(about["left_out"])] if about["left_out"] else []),
        "## How it is opened",
        form.how.replace("FOLDER", first).strip(),
        "## Model and tokens",
        _origin(subjects),
        "## Configuration",
        "What made all of them, as in saeflow's `conf/`"
        + (f"; they differ in {', '.join(code(path) for path in varying)}." if varying else "."),
        fenced(yaml.safe_dump(common, sort_keys=True), "yaml"),
        "## Licence",
        code(licence) if licence else NO_LICENCE,
    ]
    return "\n\n".join(lines) + "\n"


def _table(subjects: Sequence[Subject], names: Mapping[str, Iterable[str]]) -> str:
    head = ["folder", "what", "reads", "writes", "latents", "sparsity", *METRICS.values()]
    rows = [head, ["---"] * len(head)]
    for subject in subjects:
        spec = subject.dictionary.spec
        one = -1 if spec.hook_head_index is None else spec.hook_head_index
        what = series_name(spec.kind, spec.activation, spec.skip, spec.saelens, spec.origin.source, one)
        name, amount = spec.amount
        held = "–" if amount is None else f"{amount_name(name)} = {amount:g}"
        hooks = [code(spec.hook_name), code(spec.hook_name_out)]
        cells = [", ".join(map(code, names[subject.name])), code(what), *hooks, f"{spec.d_sae:,}", code(held)]
        rows.append([*cells, *(_measured(subject.metrics, metric) for metric in METRICS)])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _measured(metrics: Mapping[str, Any], name: str) -> str:
    """A metric with the ends of its interval, as far as it has them."""
    value, low, high = (metrics.get(f"{name}{end}") for end in ("", "_low", "_high"))
    if value is None:
        return "–"
    return f"{value:.4g}" + ("" if low is None or high is None else f" ({low:.4g} to {high:.4g})")


def _evaluated(subjects: Sequence[Subject]) -> str:
    metrics = next((subject.metrics for subject in subjects if subject.metrics), None)
    if metrics is None:
        return "They have not been evaluated."
    return (
        f"Measured on {metrics['n_tokens']:,} held-out tokens of {metrics['n_documents']:,} documents, with "
        f"{metrics['confidence']:.0%} intervals over documents in brackets. What stands in the model is the "
        "reconstruction in place of the hook that the dictionary writes; `loss recovered` is 1 where the loss is that "
        "of the clean model and 0 where it is that of the ablated one."
    )


def _left_out(left_out: Mapping[str, str]) -> str:
    return "Left out:\n\n" + "\n".join(f"- {code(name)}: {code(why)}" for name, why in left_out.items())


def _origin(subjects: Sequence[Subject]) -> str:
    models, texts = dict[str, None](), dict[str, None]()
    for subject in subjects:
        origin = subject.dictionary.spec.origin
        processing = {name: getattr(origin, name) for name in ("fold_ln", "center_writing_weights", "center_unembed")}
        said = ", ".join(f"`{name}={str(value).lower()}`" for name, value in processing.items() if value is not None)
        models[
            f"- Model: {code(_names([subject], 'model.name'))}, weights {code(origin.model_weights or 'not known')}, "
            f"opened by TransformerLens with {said or 'settings that are not known'}. Activations depend on both."
        ] = None
        size = origin.context_size or "an unknown number of"
        bos = ", each with a BOS in front" if origin.prepend_bos else ""
        text = f"- Text: {code(_names([subject], 'corpus.name'))}, rows of {size} tokens{bos}; {_trained(subject)}."
        texts[text] = None
    scaled = "- Weights take raw activations: whatever normalisation training had is folded into them."
    return "\n".join([*models, *texts, scaled])


def _trained(subject: Subject) -> str:
    """On how many tokens."""
    n = subject.settings.get("training.n_tokens")
    return "made elsewhere" if n is None else f"trained on {n:,} tokens"


def _names(subjects: Sequence[Subject], setting: str) -> str:
    found = dict.fromkeys(str(subject.settings.get(setting, "not known")) for subject in subjects)
    return ", ".join(found)


def _settings(subjects: Sequence[Subject]) -> tuple[dict[str, Any], list[str]]:
    """What the settings of all have in common, and the paths of those in which they differ."""
    rows = [subject.settings for subject in subjects]
    varying = differing(rows)
    return {path: value for path, value in rows[0].items() if path not in varying}, varying


# -------------------------------------------------------------------- Markdown
def code(text: str) -> str:
    """A code span of any text, which may stand in a table."""
    line = escape_controls(text).replace("\n", "\\n").replace("\t", "\\t").replace("|", "\\|")
    ticks = "`" * (1 + _longest(line))
    pad = " " if line[:1] in ("`", "") or line[-1:] == "`" else ""
    return f"{ticks}{pad}{line}{pad}{ticks}"


def fenced(text: str, language: str) -> str:
    """A block of code that nothing in it ends."""
    fence = "`" * max(3, 1 + _longest(text))
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"


def _longest(text: str) -> int:
    """The length of the longest run of backticks."""
    return max((len(run) for run in re.findall("`+", text)), default=0)
