"""The corpus: local files enter keys by content, in their order, whatever they are called; datasets of the hub by the
names that it knows them by."""

import dataclasses
import logging
from pathlib import Path

from saeflow.config import CorpusConfig
from saeflow.config.defaults import set_apart
from saeflow.config.labels import file_safe
from saeflow.planning.digests import DigestCache, short_hash
from saeflow.planning.expansion import PlannedPoint
from saeflow.planning.stages import Source
from saeflow.text.files import corpus_parts, digest_of_files

log = logging.getLogger(__name__)


def identify(planned: PlannedPoint) -> None:
    corpus = planned.point.corpus
    tree = planned.tree["corpus"] = planned.digests.once(corpus, lambda: _content(corpus, planned.digests))
    if corpus.case is None:  # else its model's name says it
        name = corpus.dataset.rsplit("/", 1)[-1] if corpus.dataset and not corpus.path else "text"
        planned.labels["corpus"] = f"{file_safe(name)}.{short_hash(set_apart({'corpus': tree}), 4)}"
    planned.sources |= {"corpus": corpus.path or "", "corpus_name": corpus.name}


def of_held_out(planned: PlannedPoint) -> PlannedPoint:
    """The point as its held-out tokens are made: of `evaluation.corpus`, where there is one."""
    planned.tree["evaluation"].pop("corpus", None)  # in keys it is by what the tokens are
    corpus = planned.point.evaluation.corpus
    if corpus is None:
        return planned
    seen = dataclasses.replace(
        planned,
        point=dataclasses.replace(planned.point, corpus=corpus),
        tree=dict(planned.tree),
        labels=dict(planned.labels),
        sources=dict(planned.sources),
    )
    identify(seen)
    planned.labels["evaluation.corpus"] = f"on_{seen.labels['corpus']}"
    return seen


def _content(corpus: CorpusConfig, digests: DigestCache) -> dict[str, object]:
    tree = dataclasses.asdict(corpus)
    del tree["name"], tree["path"]
    if corpus.case is not None:
        return {"case": corpus.case}
    del tree["case"]
    if corpus.path is None:
        return tree
    path = Path(corpus.path)
    parts = corpus_parts(path)
    if parts.left_out:
        log.warning("corpus %s: not read: %s", path, parts.left_out_in_words())
    content = digest_of_files(parts.read, digests)
    return {name: tree[name] for name in ("text_field", "source_field", "sample_by")} | {"content": content}


SOURCES = (Source(lambda point: True, identify),)
