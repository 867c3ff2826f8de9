"""The way of a document, from a file to a row of tokens. Another way is another list of steps here.

    read → clean → filter, decontaminate   |   drop duplicates → encode → pack, write

Whether a document is a duplicate is known when all are read. So with a deduplication there is a barrier at "|": what
passes is stored (documents/<name>.parquet), all of it is compared, and the second half begins with what was stored.
Without one, the two halves are one pass. Every step takes documents one at a time and gives on those that go on; what
it takes out is in the report. Its tasks (one per work unit) run wherever, whenever and as often as one likes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from llada.data.dedup.removal import drop_repeats
from llada.data.document import Document
from llada.data.filters.chain import filter_documents
from llada.data.outcomes import timed
from llada.data.read.cleaning import clean
from llada.data.read.documents import read
from llada.data.tokens.encoding import encode
from llada.data.tokens.writer import Written, write
from llada.data.work import tasks
from llada.data.work.job import Job, PackJob
from llada.data.work.reading import Reading
from llada.data.work.results import FilterCounts
from llada.data.work.writing import Writing


def before(reading: Reading) -> Iterator[Document]:
    """What is decided about each document by itself."""
    unit, config, report = reading.unit, reading.config, reading.report
    documents = read(
        unit.parts, reading.documents_of, config.options, report, reading.rejects, skip=reading.skip
    )
    if reading.is_dialogues:  # whose messages are cleaned as they are read; filters are for texts
        return documents
    documents = clean(documents, config.section_chars)
    documents = filter_documents(documents, reading.filters, report)
    return timed(documents, "filter", report)


def after(documents: Iterable[Document], writing: Writing) -> Written:
    """What is decided about a document among all others, and its tokens."""
    documents = drop_repeats(documents, writing.repeats, writing.min_chars, writing.report)
    encoded = encode(documents, writing.encoder, writing.report)
    return write(encoded, writing.target, writing.report)


def sample_unit(job: Job, index: int, budget_bytes: int) -> tasks.TokenizerSample:
    return tasks.sample_unit(job, index, budget_bytes, before)


def filter_unit(job: Job, index: int) -> FilterCounts:
    return tasks.filter_unit(job, index, before)


def pack_unit(job: PackJob, index: int) -> tasks.PackCounts:
    return tasks.pack_unit(job, index, before, after)
