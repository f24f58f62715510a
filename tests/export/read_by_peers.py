"""Reads exports by the own code of the tools that they are for, and prints as JSON what these make of them:
`python read_by_peers.py TOOL ARGUMENTS`, and `python read_by_peers.py schemas` what their formats have.

The tools have to be importable. Modules that reading does not use, and that are not there, are stood in for.
"""

import contextlib
import dataclasses
import importlib.util
import inspect
import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import torch
from safetensors.torch import load_file


def stand_in(*names):
    """For modules that a tool imports at its top and that reading does not need."""
    for name in names:
        if importlib.util.find_spec(name.split(".")[0]) is None:
            module = ModuleType(name)
            module.__getattr__ = any_class
            module.__spec__ = importlib.util.spec_from_loader(name, None)
            sys.modules[name] = module


def any_class(attribute):
    if attribute.startswith("__"):
        raise AttributeError(attribute)
    return SimpleNamespace


# -------------------------------------------------------------------- SAEDashboard and Neuronpedia
def saedashboard(file, folder):
    """Its numbers as it reads them, written again, and the length of the page that it makes of the first five."""
    from sae_dashboard.data_writing_fns import save_feature_centric_vis
    from sae_dashboard.sae_vis_data import SaeVisConfig, SaeVisData
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(tokenizer_file=f"{folder}/tokenizer.json")
    model = SimpleNamespace(tokenizer=tokenizer, cfg=SimpleNamespace(d_vocab=len(tokenizer)))
    config = SaeVisConfig(hook_point="hook", features=range(5))
    data = SaeVisData.load_json(file, config, model, None)
    again, page = Path(file).with_name("again.json"), Path(file).with_name("page.html")
    data.save_json(again)
    live = [i for i, one in data.feature_data_dict.items() if one.sequence_data.seq_group_data][:3]
    save_feature_centric_vis(data, page, include_only=live)
    return {"again": json.loads(again.read_text()), "page": page.read_text(), "live": live}


def saedashboard_runs(folder, tokens, model_folder, bos):
    """What SAEDashboard finds itself, of an SAE on rows of tokens: of every latent on how many tokens it fires, those
    that are a BOS left out, and the neurons aligned with its decoder row."""
    import numpy as np
    from sae_dashboard.sae_vis_data import SaeVisConfig
    from sae_dashboard.sae_vis_runner import SaeVisRunner
    from sae_lens import SAE

    from saeflow.config import ModelConfig
    from saeflow.models.loading import load_model

    published = {"fold_ln": False, "center_writing_weights": False, "center_unembed": False}
    model = load_model(Path(model_folder), ModelConfig("tiny", path=model_folder, **published), "cpu")
    sae, rows = SAE.load_from_disk(folder), torch.from_numpy(np.load(tokens))
    hook, latents = sae.cfg.metadata.hook_name, range(sae.cfg.d_sae)
    data = SaeVisRunner(SaeVisConfig(hook, latents, ignore_tokens={int(bos)})).run(sae, model, rows)
    of_each = [data.feature_data_dict[i] for i in latents]
    return {
        "fired": [sum(one.acts_histogram_data.bar_heights) for one in of_each],
        "aligned": [one.feature_tables_data.neuron_alignment_indices for one in of_each],
        "shares": [one.feature_tables_data.neuron_alignment_l1 for one in of_each],
    }


def neuronpedia(*folders):
    """Of folders every batch as its classes read it, written again."""
    from sae_dashboard.neuronpedia.neuronpedia_converter import NpEncoder
    from sae_dashboard.neuronpedia.neuronpedia_dashboard import NeuronpediaDashboardBatch

    found = []
    for folder in folders:
        texts = [file.read_text() for file in sorted(Path(folder).glob("batch-*.json"))]
        batches = [NeuronpediaDashboardBatch(**json.loads(text)) for text in texts]
        found.append([json.loads(json.dumps(batch, cls=NpEncoder)) for batch in batches])
    return found


# -------------------------------------------------------------------- delphi
def delphi(folder, tokenizer_folder):
    """Of every latent where and how strongly it fires, and the number of its examples; the tokens."""
    stand_in("faiss", "sentence_transformers", "blobfile", "bitsandbytes", "vllm")
    from delphi.config import ConstructorConfig, SamplerConfig
    from delphi.latents import LatentDataset
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(tokenizer_file=f"{tokenizer_folder}/tokenizer.json")
    constructor = ConstructorConfig(example_ctx_len=16, min_examples=1, n_non_activating=2)
    dataset = LatentDataset(Path(folder), SamplerConfig(n_examples_train=2, n_examples_test=2), constructor, tokenizer)
    found = {}
    for buffer in dataset.buffers:
        for one in buffer:
            data = one.activation_data
            found[one.latent.latent_index] = {
                "locations": data.locations.tolist(),
                "activations": data.activations.tolist(),
            }
    records = {record.latent.latent_index: record for record in dataset}
    frequency = {i: record.per_token_frequency for i, record in records.items()}
    return {"latents": found, "tokens": dataset.tokens.tolist(), "frequency": frequency, "config": dataset.cache_config}


# -------------------------------------------------------------------- circuit-tracer
def circuit_tracer(folder, inputs):
    """Latents and outputs of every layer on `x` (layer, N, D) of a file."""
    from circuit_tracer.transcoder.single_layer_transcoder import load_transcoder_set
    from yaml import safe_load

    folder, x = Path(folder), load_file(inputs)["x"]
    config = safe_load((folder / "config.yaml").read_text())
    paths = {i: str(folder / f"layer_{i}.safetensors") for i in range(len(x))}
    hooks = {name: config[name] for name in ("feature_input_hook", "feature_output_hook", "scan")}
    found = load_transcoder_set(paths, **hooks, lazy_encoder=False, lazy_decoder=False)
    with torch.no_grad():
        f = found.encode(x)
        return {"latents": f.tolist(), "outputs": found.decode(f, x).tolist(), "skip": found.skip_connection}


# -------------------------------------------------------------------- schemas
def schemas():
    """Names and types of the fields of what the tools read."""
    stand_in("faiss", "sentence_transformers", "blobfile", "bitsandbytes", "vllm")
    from delphi.config import CacheConfig
    from sae_dashboard import components, feature_data, utils_fns
    from sae_dashboard.neuronpedia import neuronpedia_dashboard
    from sae_dashboard.neuronpedia.neuronpedia_runner_config import NeuronpediaRunnerConfig

    def fields(kind):
        return {field.name: named(field.type) for field in dataclasses.fields(kind)}

    def arguments(kind):
        parameters = [*inspect.signature(kind.__init__).parameters.values()][1:]
        return {one.name: named(one.annotation) for one in parameters}

    def named(kind):
        text = kind if isinstance(kind, str) else kind.__name__ if isinstance(kind, type) else str(kind)
        if "[" in str(kind):
            text = str(kind)
        for prefix in ("sae_dashboard.components.", "sae_dashboard.feature_data.", "typing."):
            text = text.replace(prefix, "")
        return text.replace("List[", "list[").replace("Dict[", "dict[")

    names = ("FeatureTablesData", "ActsHistogramData", "LogitsTableData", "LogitsHistogramData", "SequenceData",
             "SequenceGroupData", "SequenceMultiGroupData", "DecoderWeightsDistribution")  # fmt: skip
    dashboards = {name: fields(getattr(components, name)) for name in names}
    dashboards["FeatureData"] = fields(feature_data.FeatureData)
    dashboards["FeatureStatistics"] = fields(utils_fns.FeatureStatistics)
    kinds = ("Batch", "Feature", "Activation")
    pages = {kind: arguments(getattr(neuronpedia_dashboard, f"NeuronpediaDashboard{kind}")) for kind in kinds}
    pages["run_settings"] = fields(NeuronpediaRunnerConfig)
    return {"saedashboard": dashboards, "neuronpedia": pages, "delphi": {"config": fields(CacheConfig)}}


if __name__ == "__main__":
    tool, *given = sys.argv[1:]
    with contextlib.redirect_stdout(sys.stderr):
        found = {
            "saedashboard": saedashboard,
            "saedashboard-runs": saedashboard_runs,
            "neuronpedia": neuronpedia,
            "delphi": delphi,
            "circuit-tracer": circuit_tracer,
            "schemas": schemas,
        }[tool](*given)
    print(json.dumps(found))
