"""From configuration to plan: every point of a sweep becomes the instances of the stages, in data-flow order."""

import dataclasses
import json
import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from saeflow.config import BlindConfig, ConfigError, PointConfig, build
from saeflow.dictionaries.layouts import foreign_files, foreign_format
from saeflow.models import folder as models
from saeflow.planning.digests import DigestCache, canonical, short_hash
from saeflow.planning.graph import STAGES, Instance, Plan
from saeflow.planning.sweep import Sweep
from saeflow.text.corpus import corpus_files

OF_FOREIGN = ("path", "format", "release", "sae_id", "label")  # of `dictionary`; nothing to a training
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
    expander.add_stacks(sweep.stacks)
    expander.add_heads(sweep.figures)
    if sweep.blind is not None:
        expander.add_blind(build(BlindConfig, sweep.blind, "blind."))
    expander.add_figures(sweep.figures)
    cache.save()
    return plan


class _Expander:
    """Turns points into instances of the stages, in the order of the data flow."""

    def __init__(self, plan: Plan, cache: DigestCache) -> None:
        self.plan, self.cache = plan, cache
        self._folders: dict[Any, tuple[Path, models.Geometry, str, str]] = {}
        self._corpora: dict[Any, dict[str, Any]] = {}
        self._stacks: dict[str, dict[int, _Placed]] = {}
        self._at_heads: dict[str, list[_Placed]] = {}

    def add(self, point: PointConfig) -> None:
        folder, geometry, weights, tokenizer = self._model(point)
        self._check(point, geometry)
        tree = json.loads(canonical(dataclasses.asdict(point)))  # tuples become lists, as they will be when read back
        tree["corpus"] = self._corpus(point)
        tree["tokenizer"] = tokenizer
        for name in OF_FOREIGN:
            del tree["dictionary"][name]
        if point.dictionary.kind != "jacobian":  # what does not concern a dictionary is not in its key
            for group in ("dictionary", "training"):
                tree[group] = {name: v for name, v in tree[group].items() if not name.startswith("jacobian_")}
        if point.dictionary.apply_b_dec_to_input:  # as always before there was a choice: old keys stay what they are
            del tree["dictionary"]["apply_b_dec_to_input"]
        how = {name: tree["training"].pop(name) for name in HOW_TRAINING_RUNS}
        sources = {"model": str(folder), "corpus": point.corpus.path or "", "training": canonical(how)}
        processing = {k: tree["model"][k] for k in ("fold_ln", "center_writing_weights", "center_unembed")}
        arm, of_arm = "", {}
        if point.model.randomise != "none":  # other weights: what was made for the trained ones does not fit
            of_arm = {k: tree["model"][k] for k in ("randomise", "randomise_seed")}
            weights = short_hash([weights, of_arm], 32)
            arm = f"-{point.model.randomise}{point.model.randomise_seed}"
        tree["model"] = {"weights": weights, **processing, **of_arm}

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
        store = f"{point.model.name}{arm}-{point.activations.dtype}-" + short_hash(
            [STAGES["activations"].version, stored, packing]
        )

        def column(hook: str) -> str:
            size = list(geometry.hook_size(hook))
            name = f"{store}/{_short(hook)}-{train_rows}rows"
            needs = {"tokens": [tokens["train"]]} | made
            return instance("activations", name, needs, hook_name=hook, n_rows=train_rows, size=size)

        hook, hook_out, head = point.site.hook_name, point.site.hook_name_out, point.site.head
        d = point.dictionary
        name, value = d.amount
        amount = f"k{value}" if name == "k" else f"{name.removesuffix('_coefficient')}_{value or 0:g}"
        dictionary = tree["dictionary"] | {"kind": "sae" if d.kind == "pair" else d.kind}

        def trained(hook: str, hook_out: str | None) -> str:
            name = f"{d.saelens or dictionary['kind']}-{_short(hook)}-{amount}-seed{point.seed}"
            extra = {"dictionary": dictionary, "hook_name": hook, "hook_name_out": hook_out}
            if head is not None:
                name, extra["head"] = name.replace("-seed", f"-head{head}-seed"), head
            return instance("train", name, {"activations": [column(h) for h in (hook, hook_out) if h]}, **extra)

        if d.kind == "foreign":
            key = self._foreign(point, {"model": tree["model"]}, sources)
            means = column(hook_out or hook)
            _evaluated(instance, {"foreign": [key]}, means, tokens["held_out"], head, {})
            self._note(point, tree, _Placed("foreign", key, means, tokens["held_out"], sources))
            return
        dictionaries: list[_Part]
        if d.kind == "pair":
            assert hook_out is not None
            dictionaries = [_Part(trained(h, None), h) for h in (hook, hook_out)]
        elif d.kind == "jacobian":
            assert hook_out is not None
            amount += f"-lambda{d.jacobian_coefficient:g}"
            key = trained(hook, hook_out)
            dictionaries = [_Part(key, hook, "input"), _Part(key, hook_out, "output")]
        elif d.kind == "heads":
            whole = _Part(trained(hook, None), hook)
            heads = range(geometry.hook_size(hook)[0])
            dictionaries = [whole, *(whole._replace(name=f"head_{h}", head=h) for h in heads)]
        else:
            dictionaries = [_Part(trained(hook, hook_out), hook_out or hook, head=head)]
        if d.kind in ("pair", "jacobian"):
            keys = list(dict.fromkeys(part.key for part in dictionaries))
            instance("jacobian", f"{_short(hook)}-{amount}", {"train": keys, "tokens": [tokens["held_out"]]})
        elif d.kind == "transcoder" and point.jacobian.transcoders:
            needs = {"train": [dictionaries[0].key], "tokens": [tokens["held_out"]]}
            instance("jacobian", f"transcoder-{_short(hook)}-{amount}", needs)
        for key, writes, name, of_head in dictionaries:
            part = {"part": name} if name else {}
            if made:
                needs = {"train": [key], "tokens": [tokens["held_out"]]} | made
                instance("recover", "-".join([key.rsplit("-", 1)[0], *part.values()]), needs, **part)
                continue
            _evaluated(instance, {"train": [key]}, column(writes), tokens["held_out"], of_head, part)
            if d.kind not in ("pair", "jacobian") and not name:
                self._note(point, tree, _Placed("train", key, column(writes), tokens["held_out"], sources))

    def _foreign(self, point: PointConfig, model: dict[str, Any], sources: dict[str, str]) -> str:
        """A dictionary that is read instead of trained. It enters by content, or by the names of its release."""
        d, site = point.dictionary, point.site
        held: dict[str, Any] = {"release": d.release, "sae_id": d.sae_id, "format": None, "content": None}
        label = d.label or f"{d.release} {d.sae_id}"
        if d.path is not None:
            path = Path(d.path)
            if not path.exists():
                raise ConfigError(f"dictionary.path={path}: no such file or folder")
            form = d.format or foreign_format(path)
            content = self.cache.files(path.parent if path.is_file() else path, foreign_files(path, form))
            held |= {"format": form, "content": content}
            label = d.label or path.stem
            sources = sources | {"foreign": str(path)}
        name = re.sub(r"[^\w.]+", "_", label)
        places = {"hook_name": site.hook_name, "hook_name_out": site.hook_name_out, "head": site.head}
        config = model | held | places | {"label": label}
        return self._instance("foreign", f"{name}-{_short(site.hook_name)}", config, {}, sources)

    def _note(self, point: PointConfig, tree: dict[str, Any], placed: "_Placed") -> None:
        """Keeps a dictionary for studies of heads, and for stacks: those of one stack differ in the layer alone."""
        self._note_heads(point, tree, placed)
        layer = point.site.layer
        if layer is None:
            return
        rest = {name: tree[name] for name in tree if name not in ("site", "jacobian")}
        hooks = [
            hook and hook.replace(f"blocks.{layer}.", "") for hook in (point.site.hook_name, point.site.hook_name_out)
        ]
        group = canonical([rest, hooks, point.site.head])
        at_layer = self._stacks.setdefault(group, {})
        if at_layer.setdefault(layer, placed).key != placed.key:
            at_layer[layer] = placed._replace(key="")  # several, such as foreign ones: which belongs to the stack?

    def _note_heads(self, point: PointConfig, tree: dict[str, Any], placed: "_Placed") -> None:
        """Keeps a dictionary for the study of its layer's heads, where it is of all of them.

        SAELens's own classes are left out: they have no weights in these terms.
        """
        hook, head = point.site.hook_name, point.site.head
        of_layer = re.fullmatch(r"blocks\.\d+\.attn\.hook_z", hook) and head is None
        if of_layer and point.dictionary.activation != "saelens":
            config = _project(tree, STAGES["heads"].reads)
            group = canonical([config, hook, placed.held_out])
            held = self._at_heads.setdefault(group, [])
            placed = placed._replace(of_heads=point.dictionary.kind == "heads")
            if placed.key not in [one.key for one in held]:
                held.append(placed)

    def add_heads(self, figures: list[str]) -> None:
        """One study for all dictionaries of a layer's heads, if some are of single heads or a figure asks for it."""
        asked = any(name.startswith("heads_") for name in figures)
        for group, placed in self._at_heads.items():
            config, hook, held_out = json.loads(group)
            if not asked and not any(one.of_heads for one in placed):
                continue
            needs = {stage: sorted(p.key for p in placed if p.stage == stage) for stage in ("train", "foreign")}
            needs = {stage: keys for stage, keys in needs.items() if keys} | {"tokens": [held_out]}
            self._instance("heads", _short(hook), config | {"hook_name": hook}, needs, placed[0].sources)

    def add_stacks(self, wanted: list[Any]) -> None:
        """For every group of dictionaries that differ in the layer alone, the sets of layers `wanted`."""
        for group, at_layer in self._stacks.items() if wanted else ():
            rest = json.loads(group)[0]
            for stack in wanted:
                layers = _layers(stack, sorted(at_layer))
                placed = [at_layer[layer] for layer in layers]
                if any(not one.key for one in placed):
                    raise ConfigError(
                        f"stacks: {stack} has several dictionaries of a layer that differ in nothing else"
                    )
                first = placed[0]
                named = "_".join(map(str, layers)) if isinstance(stack, list) else stack
                label = re.sub(r"-L\d+\.", "-", first.key.rsplit("-", 1)[0])
                config = {"model": rest["model"], "evaluation": rest["evaluation"], "group": label}
                config |= {"stack": named, "layers": layers}
                needs = {
                    first.stage: [one.key for one in placed],
                    "activations": [one.means for one in placed],
                    "tokens": [first.held_out],
                }
                self._instance("stack", f"{label}-{named}", config, needs, first.sources)
        if wanted and not self.plan.stages["stack"]:
            raise ConfigError("stacks: no dictionary of this experiment is of a layer; sweep site.layer")

    def add_blind(self, blind: BlindConfig) -> None:
        """One set of all dictionaries of one model and one set of held-out tokens, each with its evaluation.

        Those of heads are shown as the one that they are together: its features are theirs.
        """
        evaluations = [e for e in self.plan.stages["evaluate"].values() if "head_" not in e.config.get("part", "")]
        shared = {canonical([e.config["model"], e.needs["tokens"]]) for e in evaluations}
        if len(shared) != 1 or len(evaluations) < 2:
            raise ConfigError("blind: it takes two dictionaries or more of one model, on the same held-out tokens")
        first = next(iter(evaluations))
        needs: dict[str, list[str]] = {stage: [] for stage in ("train", "foreign")}
        by_stage = sorted(evaluations, key=lambda e: e.key)
        for evaluation in by_stage:
            for stage in needs:
                needs[stage] += evaluation.needs.get(stage, [])
        needs = {stage: list(dict.fromkeys(keys)) for stage, keys in needs.items() if keys}
        needs |= {"evaluate": [e.key for e in by_stage], "tokens": first.needs["tokens"]}
        config = {"model": first.config["model"], "blind": dataclasses.asdict(blind)}
        self._instance("blind", self.plan.experiment, config, needs, first.sources)

    def add_figures(self, figures: list[str]) -> None:
        """One instance: all figures of the experiment, from all that it measured."""
        needs = {
            s: sorted(self.plan.stages[s])
            for s in ("train", "foreign", "jacobian", "evaluate", "stack", "heads", "recover")
            if self.plan.stages[s]
        }
        made_from = {"training_curves": "train", "stacks": "stack"}
        made_from |= {f: stage for stage in ("jacobian", "heads") for f in figures if f.startswith(stage)}
        wanted = [f for f in figures if f not in made_from or self.plan.stages[made_from[f]]]
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
        if point.model.tracr and point.dictionary.kind == "foreign":
            raise ConfigError(
                "dictionary=foreign is evaluated on text, and model=tracr has none; open it with "
                "saeflow.dictionaries.load_dictionary and ask saeflow.groundtruth"
            )
        if point.tokens.context_size > geometry.n_ctx:
            raise ConfigError(
                f"tokens.context_size={point.tokens.context_size} is longer than the model's context, {geometry.n_ctx}"
            )
        for hook in (point.site.hook_name, point.site.hook_name_out):
            if hook is None:
                continue
            size = geometry.hook_size(hook)
            head = point.site.head
            heads = point.dictionary.kind == "heads" or head is not None
            if len(size) == 1 and (heads or point.dictionary.normalize_activations == "per_head"):
                key = "dictionary.normalize_activations=per_head"
                if heads:
                    key = "dictionary.kind=heads" if head is None else f"site.head={head}"
                legal = ", ".join(name for name, held in geometry.block_hooks().items() if len(held) == 2)
                raise ConfigError(f"{key} needs a hook with heads, and {hook} has none; these have: {legal}")
            if head is not None and not 0 <= head < size[0]:
                raise ConfigError(f"site.head={head} is out of range: {hook} has heads 0 to {size[0] - 1}")
            d_in = size[-1] if heads else math.prod(size)
            d_sae = point.dictionary.d_sae or d_in * (point.dictionary.expansion or 1)
            if point.dictionary.k is not None and point.dictionary.k > d_sae:
                where = f"each head of {hook}" if heads else hook
                raise ConfigError(f"dictionary.k={point.dictionary.k} is more than d_sae={d_sae} at {where}")
        rows = point.tokens.held_out_tokens // point.tokens.context_size
        usable = rows * (point.tokens.context_size - 1)
        pair = point.dictionary.kind in ("pair", "jacobian")
        if not pair and not (point.dictionary.kind == "transcoder" and point.jacobian.transcoders):
            return
        assert point.site.hook_name_out is not None
        _, norm, _ = models.block_of_hooks(point.site.hook_name, point.site.hook_name_out, geometry.parallel)
        if point.jacobian.norm == "ignored" and not (norm and pair):
            raise ConfigError(
                "jacobian.norm=ignored leaves the norm out of f, but f does not begin before the norm here; use it "
                "with a pair and site=mlp_before_norm, or set jacobian.norm=inside"
            )
        if point.jacobian.n_tokens > usable:
            raise ConfigError(
                f"jacobian.n_tokens={point.jacobian.n_tokens} is more than the {usable} held-out tokens that are not "
                "at position 0; lower it, or raise tokens.held_out_tokens"
            )


class _Part(NamedTuple):
    """What is evaluated of a training: all of it, or a part by name."""

    key: str
    writes: str
    name: str = ""
    head: int | None = None


class _Placed(NamedTuple):
    """A dictionary of one layer that is evaluated."""

    stage: str
    key: str
    means: str
    held_out: str
    sources: dict[str, str]
    of_heads: bool = False
    """Whether it consists of one for each head."""


def _layers(stack: Any, there: list[int]) -> list[int]:
    """The layers of a set, by its name or as a list."""
    named = {"all": there, "all_but_first": there[1:], "all_but_last": there[:-1], "inner": there[1:-1]}
    layers = sorted(stack) if isinstance(stack, list) else named.get(stack)
    if layers is None:
        raise ConfigError(f"stacks: {stack!r} is none of {', '.join(named)}, and no list of layers")
    missing = [layer for layer in layers if layer not in there]
    if missing or not layers:
        raise ConfigError(f"stacks: {stack} needs layers {missing or '1 or more'}; dictionaries are of layers {there}")
    return layers


def _evaluated(
    instance: Any, made: dict[str, list[str]], means: str, held_out: str, head: int | None, part: dict[str, str]
) -> None:
    """The evaluation of the dictionary `made`, or of that `part` of it, against the baseline whose mean ablation takes
    the column `means`."""
    tokens = {"tokens": [held_out]}
    name = means.split("/")[1].rsplit("-", 2)[0] + (f".{head}" if head is not None else "")
    baseline = instance("baseline", name, tokens | {"activations": [means]}, head=head)
    ((key,),) = made.values()
    label = "-".join([key.rsplit("-", 1)[0], *part.values()])
    instance("evaluate", label, made | {"baseline": [baseline]} | tokens, **part)


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
    flops = device.get("flops")
    if not isinstance(flops, int | float) or flops <= 0:
        raise ConfigError(f"device.flops={flops}: set it to floating-point operations a second, such as 1.0e+11")
