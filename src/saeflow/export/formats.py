"""The formats that there are, by the name that FORMAT takes."""

import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saeflow.config import ConfigError

if TYPE_CHECKING:
    from saeflow.export.subjects import Subject


@dataclass(frozen=True)
class Format:
    """A format of another tool."""

    name: str
    about: str
    writer: str
    """`module:function` that writes `Subject`s into a folder: imported by name, since most are slow to import."""
    how: str
    """Markdown that says how it is opened; FOLDER stands for the first dictionary's."""
    library: str | None = None
    """Hugging Face's name of the tool, where it has one."""

    @property
    def write(self) -> Callable[[list["Subject"], Path], dict[str, Any]]:
        """Writes dictionaries into an empty folder; returns what `export.json` says of them: `entries`, the folders of
        each by its name, and `left_out`, why others have none.

        Raises `Refusal` where none of them can be expressed.
        """
        found: Callable[[list[Subject], Path], dict[str, Any]] = pkgutil.resolve_name(self.writer)
        return found


SAELENS = """
```python
from sae_lens import SAE

sae = SAE.load_from_disk("FOLDER")  # of this folder; from Hugging Face, where this lies as user/name:
sae = SAE.from_pretrained("user/name", "FOLDER")
```

```python
from saeflow.dictionaries import load_dictionary

dictionary = load_dictionary("FOLDER")
latents = dictionary.encode(x)  # x (tokens, d_in), raw activations of the hook that it reads
```

In saeflow's workflow it is `dictionary=foreign dictionary.path=FOLDER`.
"""

CIRCUIT_TRACER = """
```python
from pathlib import Path
import yaml
from circuit_tracer.utils.hf_utils import load_transcoders

folder = Path("FOLDER")
config = yaml.safe_load((folder / "config.yaml").read_text())
layers = range(len([*folder.glob("layer_*.safetensors")]))
config["transcoders"] = [str(folder / f"layer_{i}.safetensors") for i in layers]
transcoders = load_transcoders(config)
```

From Hugging Face, where this lies as user/name, it is `load_transcoder_from_hub("user/name/FOLDER")`.
"""

NEURONPEDIA = """
`FOLDER` is what SAEDashboard's `neuronpedia-runner` leaves. Neuronpedia makes its upload of it by
`convert-saedashboard-to-neuronpedia-export.py --saedashboard-output-dir=FOLDER`, which asks who publishes it and where
the weights lie (after sae-dashboard 0.8, also `sae_dashboard.neuronpedia.neuronpedia_export`).
"""

SAEDASHBOARD = """
```python
from sae_dashboard.data_writing_fns import save_feature_centric_vis
from sae_dashboard.sae_vis_data import SaeVisConfig, SaeVisData

config = SaeVisConfig(hook_point=hook_name, features=[0, 1, 2])
data = SaeVisData.load_json("FOLDER", config, model, sae)  # a HookedTransformer, and SAELens's SAE
save_feature_centric_vis(data, "latents.html", include_only=[0, 1, 2])
```
"""

DELPHI = """
```python
from delphi.config import ConstructorConfig, SamplerConfig
from delphi.latents import LatentDataset

dataset = LatentDataset("FOLDER", SamplerConfig(), ConstructorConfig(), tokenizer=tokenizer)
```
"""

FORMATS = {
    one.name: one
    for one in (
        Format(
            "saelens",
            "a release of SAELens's: a folder a dictionary, with a model card",
            "saeflow.export.saelens:write",
            SAELENS,
            "saelens",
        ),
        Format(
            "circuit-tracer",
            "transcoders of all layers as circuit-tracer's sets: a folder a set",
            "saeflow.export.circuit_tracer:write",
            CIRCUIT_TRACER,
        ),
        Format(
            "neuronpedia",
            "tables of latents as Neuronpedia's converter takes them: a folder a dictionary",
            "saeflow.export.neuronpedia:write",
            NEURONPEDIA,
        ),
        Format(
            "saedashboard",
            "tables of latents as SAEDashboard's pages are made of: a JSON file a dictionary",
            "saeflow.export.saedashboard:write",
            SAEDASHBOARD,
        ),
        Format(
            "delphi",
            "where latents fire, as delphi's caches for automatic explanations: a folder a dictionary",
            "saeflow.export.delphi:write",
            DELPHI,
        ),
    )
}


def format_named(name: str) -> Format:
    """Raises `ConfigError` for a name that is none."""
    if name not in FORMATS:
        legal = "; ".join(f"{one.name} ({one.about})" for one in FORMATS.values())
        raise ConfigError(f"FORMAT={name or '(none given)'} is no format; these are: {legal}")
    return FORMATS[name]
