"""Where in the model dictionaries read and write, and how activations are stored."""

from dataclasses import dataclass
from typing import Literal

from saeflow.config.checks import at_least, require


@dataclass(frozen=True)
class SiteConfig:
    """Where in the model dictionaries read and write."""

    hook_name: str
    """The hook that a dictionary reads, by TransformerLens's name."""
    hook_name_out: str | None = None
    """The hook that it writes, of transcoders and pairs; null: the one that it reads."""
    layer: int | None = None
    """[index] Of the block, from 0; what the hooks of `conf/site/` are made of."""
    head: int | None = None
    """[index] Of a hook with heads, the one that an SAE is of (`kind=sae`, or foreign); null: all of them."""

    def __post_init__(self) -> None:
        for name in ("layer", "head"):
            value = getattr(self, name)
            require(value is None or value >= 0, f"site.{name}", value, "0 or more: the first is 0")


@dataclass(frozen=True)
class ActivationsConfig:
    """How activations are stored."""

    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    """Of the numbers on the disk; the model runs in float32."""
    batch_rows: int = 16
    """[rows] How many go through the model at once."""
    chunk_tokens: int = 4096
    """[tokens] In a chunk, the unit of checksums, which is held in memory whole."""
    shard_tokens: int = 65536
    """[tokens] In a shard, which is one file: a multiple of `chunk_tokens`."""

    def __post_init__(self) -> None:
        at_least(1, self, "activations", "batch_rows chunk_tokens")
        wanted = f"{2**20:,} or less: a chunk is held in memory whole"
        require(self.chunk_tokens <= 2**20, "activations.chunk_tokens", self.chunk_tokens, wanted)
        divides = self.shard_tokens > 0 and self.shard_tokens % self.chunk_tokens == 0
        require(divides, "activations.shard_tokens", self.shard_tokens, "a multiple of activations.chunk_tokens")
