"""The corpus: local files enter keys by content, datasets of the hub by the names that it knows them by."""

import dataclasses
from pathlib import Path

from saeflow.config import ConfigError, CorpusConfig
from saeflow.planning.digests import DigestCache
from saeflow.planning.expansion import PlannedPoint
from saeflow.planning.stages import Source
from saeflow.text.corpus import corpus_digest


def identify(planned: PlannedPoint) -> None:
    corpus = planned.point.corpus
    planned.tree["corpus"] = planned.digests.once(corpus, lambda: _content(corpus, planned.digests))
    planned.sources["corpus"] = corpus.path or ""


def _content(corpus: CorpusConfig, digests: DigestCache) -> dict[str, object]:
    tree = dataclasses.asdict(corpus)
    del tree["name"], tree["path"]
    if corpus.case is not None:
        return {"case": corpus.case}
    del tree["case"]
    if corpus.path is None:
        return tree
    path = Path(corpus.path)
    if not path.exists():
        raise ConfigError(f"corpus.path={path}: no such file or folder")
    content = corpus_digest(path, digests)
    return {name: tree[name] for name in ("text_field", "source_field", "sample_by")} | {"content": content}


SOURCES = (Source(lambda point: True, identify),)
