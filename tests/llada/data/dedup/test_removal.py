"""Leaving out of a unit what was found to stand in the corpus before."""

import numpy as np

from llada.data.dedup.removal import Repeats, drop_repeats, repeated_documents, repeated_lines
from llada.data.dedup.steps import (
    DedupConfig,
    deduplicate,
    document_ids,
    line_rows,
    plan_dedup,
    write_unit_rows,
)
from llada.data.document import Document
from llada.data.outcomes import Report

LINE = "A line that is long enough to be compared with others. " * 3


def test_documents_and_lines_go_and_the_report_says_why():
    texts = ["first", "copy of another", "copy of an earlier one", f"kept\n{LINE}\nkept too", LINE, "last"]
    documents = [Document(text, f"x:{number}", language="en") for number, text in enumerate(texts)]
    report = Report()
    repeats = Repeats({1: 77, 2: 0}, {3: [1], 4: [0]})
    left = list(drop_repeats(documents, repeats, min_chars=5, report=report))
    assert [document.text for document in left] == ["first", "kept\nkept too", "last"]
    assert left[1].place == "x:3"
    assert report.refused() == {"duplicate": 1, "duplicate_of_earlier_snapshot": 1, "duplicate_lines": 1}
    assert report.edits == {"duplicate_lines": 2}
    assert report.samples["duplicate"][0]["value"] == 77
    assert report.samples["duplicate_of_earlier_snapshot"][0]["value"] is None


def test_nothing_is_dropped_where_nothing_repeats():
    documents = [Document("a"), Document("")]
    assert list(drop_repeats(documents, Repeats(), 1, Report())) == documents


def test_removals_are_read_by_their_positions(tmp_path):
    config = DedupConfig(fuzzy=False, lines=True)
    units = [[LINE, "other"], ["no line", f"x\n{LINE}"]]
    urls = [f"{tmp_path}/{number}" for number in range(2)]
    rows = [write_unit_rows(url, line_rows(unit, config)) for url, unit in zip(urls, units, strict=True)]
    plan = plan_dedup("lines", 2, sum(rows))
    deduplicate(urls, f"{tmp_path}/lines", plan, config)
    assert [repeated_lines(f"{tmp_path}/lines", plan, unit) for unit in range(2)] == [{}, {1: [1]}]
    keys = np.array([[5, 0], [6, 1]], dtype=np.uint64)
    for url in urls:
        write_unit_rows(url, keys)
    plan = plan_dedup("documents", 2, 4)
    deduplicate(urls, f"{tmp_path}/documents", plan, config)
    stays = document_ids(np.zeros(2, np.uint64), np.arange(2, dtype=np.uint64)).tolist()
    found = [repeated_documents(f"{tmp_path}/documents", plan, unit) for unit in range(2)]
    assert found == [{}, {0: stays[0], 1: stays[1]}]
