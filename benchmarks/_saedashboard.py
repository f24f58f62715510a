"""How long SAEDashboard takes for the data of its pages: `python _saedashboard.py SAE TOKENS.npy MODEL THREADS`.

`SaeVisRunner` with its defaults (256 latents at a time, 64 rows a pass) on all latents of a SAELens folder; the model,
the SAE and the tokens (rows, context_size) are open before the clock starts. Prints seconds.
"""

import contextlib
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import torch

warnings.simplefilter("ignore")


def main(folder: str, tokens: str, model_folder: str, threads: str) -> None:
    with contextlib.redirect_stdout(sys.stderr):
        from sae_dashboard.sae_vis_data import SaeVisConfig
        from sae_dashboard.sae_vis_runner import SaeVisRunner
        from sae_lens import SAE

        from saeflow.config import ModelConfig
        from saeflow.models.loading import load_model

        torch.set_num_threads(int(threads))
        model = load_model(Path(model_folder), ModelConfig("embedded", path=model_folder), "cpu")
        sae, rows = SAE.load_from_disk(folder), torch.from_numpy(np.load(tokens))
        config = SaeVisConfig(hook_point=sae.cfg.metadata.hook_name, features=range(sae.cfg.d_sae))
        start = time.perf_counter()
        data = SaeVisRunner(config).run(encoder=sae, model=model, tokens=rows)
        seconds = time.perf_counter() - start
        assert len(data.feature_data_dict) == sae.cfg.d_sae
    print(seconds)


main(*sys.argv[1:])
