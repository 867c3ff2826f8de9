"""What a preparation reads: its sources, and the lists, models and evaluation sets that its filters use."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace

from llada.data.dedup.decontaminate import build_index, coverage_problem
from llada.data.read.listing import list_inputs
from llada.data.work.config import PrepareConfig, SourceConfig
from llada.data.work.job import Snapshot
from llada.errors import UserError
from llada.files import absolute, sha256
from pipelines.stage.artifact import config_hash

_log = logging.getLogger(__name__)


def settle_sources(
    config: PrepareConfig, inputs: Sequence[str], written: Sequence[str] = ()
) -> list[SourceConfig]:
    """The corpora to read, with absolute inputs; what is `written` is none. Raises UserError when one holds nothing to
    read."""
    if inputs and config.sources:
        raise UserError("give either --input or --mixture: a mixture names its own inputs")
    sources = list(config.sources) or [SourceConfig("", tuple(inputs), read=config.read)]
    sources = [replace(s, input=tuple(_absolute(url) for url in s.input)) for s in sources]
    for source in sources:
        next(list_inputs(source.input, written=written))  # before anything is written
    return sources


def _absolute(url: str) -> str:
    """Of a file, or of a list of files."""
    return "@" + absolute(url[1:]) if url.startswith("@") else absolute(url)


def settle_resources(config: PrepareConfig, snapshot: Snapshot, sources: Sequence[SourceConfig]) -> str:
    """Put the index of the evaluation sets, as they are now, into the snapshot; a hash of it and of the other files
    that the filters use, "" without any."""
    urls = [url for source in sources for each in source.read.chain() for url in each.files()]
    if config.decontamination.files:
        urls.append(snapshot.evaluation_index_url)
        index = build_index(config.decontamination)
        index.save(urls[-1])
        if problem := coverage_problem(index.coverage, config.decontamination.min_words):
            _log.warning("decontamination: %s", problem)
    try:
        return config_hash({"files": [sha256(url) for url in urls]}) if urls else ""
    except FileNotFoundError as error:
        raise UserError(f"a filter's settings name a file that is not there: {error}") from error
