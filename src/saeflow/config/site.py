"""Where in the model dictionaries read and write, and how activations are stored."""

from dataclasses import dataclass
from typing import Literal

from saeflow.config.checks import at_least, require


@dataclass(frozen=True)
class SiteConfig:
    """`hook_name` is where a dictionary reads; transcoders and pairs also have `hook_name_out`. `head`: of a hook with
    heads, the one that an SAE is of (`kind=sae`, or foreign)."""

    hook_name: str
    hook_name_out: str | None = None
    layer: int | None = None
    head: int | None = None

    def __post_init__(self) -> None:
        for name in ("layer", "head"):
            value = getattr(self, name)
            require(value is None or value >= 0, f"site.{name}", value, "0 or more: the first is 0")


@dataclass(frozen=True)
class ActivationsConfig:
    """`batch_rows` rows go through the model at once. A chunk is the unit of checksums, a shard one file."""

    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    batch_rows: int = 16
    chunk_tokens: int = 4096
    shard_tokens: int = 65536

    def __post_init__(self) -> None:
        at_least(1, self, "activations", "batch_rows chunk_tokens")
        wanted = f"{2**20:,} or less: a chunk is held in memory whole"
        require(self.chunk_tokens <= 2**20, "activations.chunk_tokens", self.chunk_tokens, wanted)
        divides = self.shard_tokens > 0 and self.shard_tokens % self.chunk_tokens == 0
        require(divides, "activations.shard_tokens", self.shard_tokens, "a multiple of activations.chunk_tokens")
