"""From configuration to plan: every point of a sweep becomes the instances of the stages, in data-flow order."""

import dataclasses
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from saeflow import models
from saeflow.config import ConfigError, PointConfig, build
from saeflow.corpus import corpus_files
from saeflow.digest import DigestCache, canonical, short_hash
from saeflow.plan import STAGES, Instance, Plan
from saeflow.sweep import Sweep

HOW_TRAINING_RUNS = ("loggers", "together", "checkpoint_seconds", "keep_checkpoints")  # makes no dictionary another


def compose(
    conf: str | Path, overrides: list[str], results: str = "results", digests: str | Path | None = None
) -> Plan:
    """Composes `conf/` with Hydra overrides into a plan; `digests` is a file that remembers content hashes.

    Raises `ConfigError` for anything that cannot run: an unknown key or group, an impossible combination, a model
    without weights, a hook that the model does not have.
    """
    cache = DigestCache(digests)
    plan = Plan("", {name: {} for name in STAGES}, {}, results=results)
    sweep = Sweep(Path(conf).resolve(), overrides)
    plan.experiment = sweep.experiment
    plan.device = sweep.device
    _check_device(plan.device)
    expander = _Expander(plan, cache)
    for tree in sweep.points():
        expander.add(build(PointConfig, tree))
    expander.add_figures(sweep.figures)
    cache.save()
    return plan


class _Expander:
    """Turns points into instances of the stages, in the order of the data flow."""

    def __init__(self, plan: Plan, cache: DigestCache) -> None:
        self.plan, self.cache = plan, cache
        self._folders: dict[Any, tuple[Path, models.Geometry, str, str]] = {}
        self._corpora: dict[Any, dict[str, Any]] = {}

    def add(self, point: PointConfig) -> None:
        folder, geometry, weights, tokenizer = self._model(point)
        self._check(point, geometry)
        tree = json.loads(canonical(dataclasses.asdict(point)))  # tuples become lists, as they will be when read back
        tree["corpus"] = self._corpus(point)
        tree["tokenizer"] = tokenizer
        if point.dictionary.kind != "jacobian":  # what does not concern a dictionary is not in its key
            for group in ("dictionary", "training"):
                tree[group] = {name: v for name, v in tree[group].items() if not name.startswith("jacobian_")}
        how = {name: tree["training"].pop(name) for name in HOW_TRAINING_RUNS}
        sources = {"model": str(folder), "corpus": point.corpus.path or "", "training": canonical(how)}
        processing = {k: tree["model"][k] for k in ("fold_ln", "center_writing_weights", "center_unembed")}
        tree["model"] = {"weights": weights, **processing}

        made = {"groundtruth": [weights]} if point.model.tracr else {}  # the model is an artifact too

        def instance(stage: str, label: str, needs: dict[str, list[str]], **extra: Any) -> str:
            config = _project(tree, STAGES[stage].reads) | extra
            return self._instance(stage, label, config, needs, sources)

        label = f"{point.corpus.name}-ctx{point.tokens.context_size}"
        train_rows = point.tokens.train_tokens // point.tokens.context_size
        held_out_rows = point.tokens.held_out_tokens // point.tokens.context_size
        packing = short_hash([STAGES["tokens"].version, _project(tree, STAGES["tokens"].reads)])
        rows = {"train": train_rows, "held_out": held_out_rows}
        tokens = {s: instance("tokens", f"{label}-{s}", {}, split=s, n_rows=n) for s, n in rows.items()}

        # One store a (model, processing, packing, dtype); neither the hooks nor the number of rows are in its key, so
        # that both can grow in place.
        stored = _project(tree, STAGES["activations"].reads)
        store = f"{point.model.name}-{point.activations.dtype}-" + short_hash(
            [STAGES["activations"].version, stored, packing]
        )

        def column(hook: str) -> str:
            size = list(geometry.hook_size(hook))
            name = f"{store}/{_short(hook)}-{train_rows}rows"
            needs = {"tokens": [tokens["train"]]} | made
            return instance("activations", name, needs, hook_name=hook, n_rows=train_rows, size=size)

        hook, hook_out = point.site.hook_name, point.site.hook_name_out
        d = point.dictionary
        name, value = d.amount
        amount = f"k{value}" if name == "k" else f"{name.removesuffix('_coefficient')}_{value or 0:g}"
        dictionary = tree["dictionary"] | {"kind": "sae" if d.kind == "pair" else d.kind}

        def trained(hook: str, hook_out: str | None) -> str:
            name = f"{d.saelens or dictionary['kind']}-{_short(hook)}-{amount}-seed{point.seed}"
            extra = {"dictionary": dictionary, "hook_name": hook, "hook_name_out": hook_out}
            return instance("train", name, {"activations": [column(h) for h in (hook, hook_out) if h]}, **extra)

        dictionaries: list[
            tuple[str, dict[str, str], str]
        ]  # each to evaluate: its key, its part of that, where it writes
        if d.kind == "pair":
            assert hook_out is not None
            dictionaries = [(trained(h, None), {}, h) for h in (hook, hook_out)]
        elif d.kind == "jacobian":
            assert hook_out is not None
            amount += f"-lambda{d.jacobian_coefficient:g}"
            key = trained(hook, hook_out)
            dictionaries = [(key, {"part": "input"}, hook), (key, {"part": "output"}, hook_out)]
        else:
            dictionaries = [(trained(hook, hook_out), {}, hook_out or hook)]
        if d.kind in ("pair", "jacobian"):
            keys = list(dict.fromkeys(key for key, _, _ in dictionaries))
            instance("jacobian", f"{_short(hook)}-{amount}", {"train": keys, "tokens": [tokens["held_out"]]})
        for key, part, writes in dictionaries:
            if made:
                needs = {"train": [key], "tokens": [tokens["held_out"]]} | made
                instance("recover", "-".join([key.rsplit("-", 1)[0], *part.values()]), needs, **part)
                continue
            needs = {"train": [key], "tokens": [tokens["held_out"]], "activations": [column(writes)]}
            instance("evaluate", "-".join([key.rsplit("-", 1)[0], *part.values()]), needs, **part)

    def add_figures(self, figures: list[str]) -> None:
        """One instance: all figures of the experiment, from all that it measured."""
        measured = ("train", "jacobian", "evaluate", "recover")
        needs = {s: sorted(self.plan.stages[s]) for s in measured if self.plan.stages[s]}
        wanted = [f for f in figures if f != "jacobian_histogram" or self.plan.stages["jacobian"]]
        self._instance("figures", self.plan.experiment, {"figures": wanted}, needs, {})

    def _instance(
        self, stage: str, label: str, config: dict[str, Any], needs: dict[str, list[str]], sources: dict[str, str]
    ) -> str:
        key = f"{label}-{short_hash([stage, STAGES[stage].version, config, needs])}"
        self.plan.stages[stage].setdefault(key, Instance(stage, key, config, needs, sources))
        return key

    def _model(self, point: PointConfig) -> tuple[Path, models.Geometry, str, str]:
        if point.model.tracr:
            return self._made(point)
        name = (point.model.path, point.model.hub, point.model.revision)
        if name not in self._folders:
            folder = models.resolve_folder(point.model)
            weights = models.model_digest(folder, self.cache)
            tokenizer = models.tokenizer_digest(folder, self.cache)
            self._folders[name] = (folder, models.read_geometry(folder), weights, tokenizer)
        return self._folders[name]

    def _made(self, point: PointConfig) -> tuple[Path, models.Geometry, str, str]:
        """A model that the pipeline makes: what identifies its weights is the key of the artifact that they will be."""
        from saeflow.groundtruth.plan import check_case, geometry_of_case

        assert point.model.tracr
        check_case(point)
        config = json.loads(canonical(dataclasses.asdict(point.model.tracr)))
        if config["method"] == "compiled":  # the rest says how to train
            config = {name: config[name] for name in ("case", "method")}
        label = f"case{config['case']}-{config['method']}" + (f"-seed{config['seed']}" if "seed" in config else "")
        key = self._instance("groundtruth", label, {"tracr": config}, {}, {})
        return self.plan.folder("groundtruth", key), geometry_of_case(point.model.tracr), key, ""

    def _corpus(self, point: PointConfig) -> dict[str, Any]:
        """What identifies a corpus: the content of local files, the names that the hub knows a dataset by."""
        if point.corpus not in self._corpora:
            tree = dataclasses.asdict(point.corpus)
            del tree["name"], tree["path"]
            if point.corpus.case is not None:
                tree = {"case": point.corpus.case}
            elif tree.pop("case") is None and point.corpus.path is not None:
                path = Path(point.corpus.path)
                if not path.exists():
                    raise ConfigError(f"corpus.path={path}: no such file or folder")
                tree = {k: tree[k] for k in ("text_field", "source_field", "sample_by")}
                tree["content"] = self.cache.files(path.parent if path.is_file() else path, corpus_files(path))
            self._corpora[point.corpus] = tree
        return self._corpora[point.corpus]

    def _check(self, point: PointConfig, geometry: models.Geometry) -> None:
        """What only the model can tell."""
        if point.tokens.context_size > geometry.n_ctx:
            raise ConfigError(
                f"tokens.context_size={point.tokens.context_size} is longer than the model's context, {geometry.n_ctx}"
            )
        for hook in (point.site.hook_name, point.site.hook_name_out):
            if hook is None:
                continue
            size = geometry.hook_size(hook)
            d_in = size[0] if len(size) == 1 else size[0] * size[1]
            d_sae = point.dictionary.d_sae or d_in * (point.dictionary.expansion or 1)
            if point.dictionary.k is not None and point.dictionary.k > d_sae:
                raise ConfigError(f"dictionary.k={point.dictionary.k} is more than d_sae={d_sae} at {hook}")
        rows = point.tokens.held_out_tokens // point.tokens.context_size
        usable = rows * (point.tokens.context_size - 1)
        if point.dictionary.kind not in ("pair", "jacobian"):
            return
        assert point.site.hook_name_out is not None
        models.block_of_hooks(point.site.hook_name, point.site.hook_name_out, geometry.parallel)
        if point.jacobian.n_tokens > usable:
            raise ConfigError(
                f"jacobian.n_tokens={point.jacobian.n_tokens} is more than the {usable} held-out tokens that are not "
                "at position 0; lower it, or raise tokens.held_out_tokens"
            )


def _project(tree: dict[str, Any], paths: Iterable[str]) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for path in paths:
        *parents, leaf = path.split(".")
        source, node = tree, out
        for part in parents:
            source, node = source[part], node.setdefault(part, {})
        node[leaf] = source[leaf]
    return out


def _short(hook_name: str) -> str:
    """`blocks.2.ln2.hook_normalized` as `L2.ln2.normalized`, for labels."""
    return hook_name.replace("blocks.", "L").replace("hook_", "")


def _check_device(device: dict[str, Any]) -> None:
    """Errors now rather than in the job: a stage without a device, or a device that is not a device's name."""
    for stage in STAGES:
        name = str(device.get(stage))
        if name.split(":")[0] not in ("cpu", "cuda", "mps"):
            raise ConfigError(f"device.{stage}={name}: use cpu, cuda, cuda:N or mps")
