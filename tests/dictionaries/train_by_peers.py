"""Trains dictionaries by the own code of sparsify and dictionary_learning, on a Hugging Face model's MLP outputs, and
saves them as these libraries do: `python train_by_peers.py LIBRARY MODEL TOKENS.npy LAYER OUT`.

Both have to be importable. Beside each folder lies `<name>.safetensors`: activations `x` (N, d), and what the
library itself makes of them, `y` (N, d).
"""

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

STEPS, LATENTS, K = 40, 256, 8


def activations(model, layer, tokens):
    """Outputs of the layer's MLP, (N, d)."""
    found = []
    hook = model.gpt_neox.layers[layer].mlp.register_forward_hook(lambda *args: found.append(args[2]))
    with torch.no_grad():
        model(tokens)
    hook.remove()
    return found[0].flatten(0, 1)


def sparsify(model, x, tokens, layer, out):
    """Its `Trainer`, end to end: it runs the model itself."""
    from datasets import Dataset
    from sparsify import SparseCoder, SparseCoderConfig, TrainConfig, Trainer

    config = TrainConfig(
        SparseCoderConfig(num_latents=LATENTS, k=K),
        batch_size=4,
        optimizer="adam",
        lr=1e-3,
        lr_warmup_steps=1,
        hookpoints=[f"layers.{layer}.mlp"],
        save_dir=str(out),
        run_name="sparsify",
        log_to_wandb=False,
    )
    Trainer(config, Dataset.from_dict({"input_ids": tokens.tolist()}).with_format("torch"), model).fit()
    (made,) = (file.parent for file in (out / "sparsify").rglob("sae.safetensors"))
    made.rename(out / "sparsify-topk")
    return {"sparsify-topk": SparseCoder.load_from_disk(out / "sparsify-topk")(x).sae_out}


def dictionary_learning(model, x, tokens, layer, out):
    """Its trainers, step by step; saved as its `trainSAE` does, which cannot be imported without nnsight."""
    package = ModuleType("dictionary_learning")  # without its __init__, which imports nnsight
    spec = importlib.util.find_spec("dictionary_learning")
    package.__path__ = list(spec.submodule_search_locations)
    sys.modules["dictionary_learning"] = package
    from dictionary_learning.trainers.batch_top_k import BatchTopKTrainer
    from dictionary_learning.trainers.standard import StandardTrainer, StandardTrainerAprilUpdate
    from dictionary_learning.trainers.top_k import TopKTrainer

    shared = {"steps": STEPS, "activation_dim": x.shape[1], "dict_size": LATENTS, "layer": layer, "lm_name": "embedded"}
    shared |= {"warmup_steps": 0, "device": "cpu", "lr": 1e-3, "seed": 0}
    l1 = {"l1_penalty": 0.05, "sparsity_warmup_steps": None}
    found = {}
    for name, trainer in {
        "topk": TopKTrainer(**shared, k=K),
        "batchtopk": BatchTopKTrainer(**shared, k=K, threshold_start_step=5),
        "standard": StandardTrainer(**shared, **l1),
        "april": StandardTrainerAprilUpdate(**shared, **l1),
    }.items():
        for step in range(STEPS):
            rows = torch.randint(0, len(x), (256,), generator=torch.Generator().manual_seed(step))
            trainer.update(step, x[rows])
        folder = out / f"dictionary_learning-{name}"
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps({"trainer": trainer.config}, indent=4))
        torch.save({key: t.cpu() for key, t in trainer.ae.state_dict().items()}, folder / "ae.pt")  # noqa: TID251
        use = {"use_threshold": True} if name == "batchtopk" else {}
        with torch.no_grad():
            found[folder.name] = trainer.ae.decode(trainer.ae.encode(x, **use))
    return found


if __name__ == "__main__":
    library, model_folder, tokens_file, layer, out = sys.argv[1:]
    torch.manual_seed(0)
    model, tokens = AutoModelForCausalLM.from_pretrained(model_folder), torch.from_numpy(np.load(tokens_file))
    x = activations(model, int(layer), tokens)
    train = {"sparsify": sparsify, "dictionary_learning": dictionary_learning}[library]
    for name, y in train(model, x, tokens, int(layer), Path(out)).items():
        save_file({"x": x[:500].contiguous(), "y": y[:500].detach().contiguous()}, Path(out) / f"{name}.safetensors")
