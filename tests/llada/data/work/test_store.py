"""Documents at the barrier, stored and read back."""

import pytest

from llada.data.batching import BATCH_CHARS
from llada.data.dedup.steps import DedupConfig
from llada.data.document import Document
from llada.data.outcomes import Report
from llada.data.work.store import store_documents, stored_document, stored_documents
from llada.errors import UserError

DOCUMENTS = [
    Document(text, f"s3://x:{n}", language="en") for n, text in enumerate(("a", "b" * BATCH_CHARS, "ç"))
]


def test_documents_come_back_in_order_and_one_by_one(tmp_path):
    url, keys = str(tmp_path / "a.parquet"), str(tmp_path / "a.keys")
    report = Report()
    assert store_documents(DOCUMENTS, url, keys, DedupConfig(fuzzy=False), report) == (3, 3)
    assert list(stored_documents(url)) == DOCUMENTS
    assert [stored_document(url, position) for position in (2, 0, 1)] == [DOCUMENTS[n] for n in (2, 0, 1)]
    with pytest.raises(UserError, match=r"a\.parquet ends before the document"):
        stored_document(url, 3)
    assert set(report.seconds) == {"store", "minhash"}


def test_a_unit_of_which_nothing_passes_is_stored_too(tmp_path):
    url = str(tmp_path / "a.parquet")
    assert store_documents([], url, str(tmp_path / "a.keys"), DedupConfig(), Report()) == (0, 0)
    assert list(stored_documents(url)) == []
