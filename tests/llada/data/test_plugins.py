"""A reader and a filter from outside the repository, in a module that $LLADA_PLUGINS names."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

PLUGIN = """
from dataclasses import dataclass

from llada.data.filters.chain import FILTERS
from llada.data.filters.filter import Filter, Filtered, Verdict
from llada.data.read.formats import READERS
from llada.data.read.parts import Reader, Record
from llada.data.read.stream import read_texts


def read_toy(part, options, rejects):
    for line, text in read_texts(part, b";", options.max_record_bytes, rejects):
        if text.strip() == "broken":
            rejects.add("broken_toy", part.label, line, text)
        else:
            yield Record({"text": text}, line)


READERS.register("toy")(
    Reader((".toy",), read_toy, is_compressible=True, is_divisible=True, text_field="text")
)


@FILTERS.register("toys")
@dataclass(frozen=True)
class Toys(Filter):
    most: int = 1
    label = "Too many toys"
    reasons = {"toys.many": "more than `most`"}

    def __call__(self, document, view):
        number = view.pieces.count("toy")
        return Filtered(document, Verdict("toys.many", number, self.most) if number > self.most else None)
"""

PROGRAM = """
import json, sys
from llada.data.filters.chain import FilterChain, filter_documents
from llada.data.outcomes import Rejects, Report
from llada.data.read.cleaning import clean
from llada.data.read.documents import read, read_documents
from llada.data.read.formats import supported
from llada.data.read.listing import list_inputs
from llada.data.report.funnel import in_order, step_name, step_of
from llada.data.work.job import PrepareConfig
from llada.data.work.read_config import ReadConfig
from llada.data.work.units import cut_file

config = ReadConfig(filters=("toys", "pii"))
report, rejects = Report(), Rejects()
parts = [part for file in list_inputs(sys.argv[1:]) for part in cut_file(file, 8)]
documents = read(parts, read_documents, config.options, report, rejects)
kept = list(filter_documents(clean(documents), FilterChain(config.chain()), report))
print(json.dumps({
    "texts": [document.text for document in kept],
    "parts": len(parts),
    "refused": report.refused(),
    "rejected": rejects.counts,
    "supported": supported(),
    "steps": [step_name(step) for step in in_order(map(step_of, ("toys.many", "too_short", "url.page")))],
    "plugins": PrepareConfig(read=config).content().get("plugins"),
    "none": "plugins" in PrepareConfig(read=ReadConfig(filters=("web",))).content(),
}))
"""


def test_a_toy_reader_and_a_toy_filter(tmp_path):
    (tmp_path / "toy_plugin.py").write_text(PLUGIN)
    (tmp_path / "data").mkdir()
    (tmp_path / "data/a.toy").write_text("one toy;a toy and a toy;broken;call me: no@body.org;")
    (tmp_path / "data/b.other").write_text("unknown")
    root = str(Path(__file__).resolve().parents[3])
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path / "data")],
        env={**os.environ, "LLADA_PLUGINS": "toy_plugin", "PYTHONPATH": f"{root}:{tmp_path}"},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["texts"][0] == "one toy"
    assert found["texts"][1].startswith("call me: ")
    assert "no@body.org" not in found["texts"][1]
    assert found["parts"] == 7  # each record is read once, however the file is cut
    assert found["refused"] == {"toys.many": 1}
    assert found["rejected"] == {"broken_toy": 1}
    assert " .warc .wet .toy (each also" in found["supported"]
    assert found["steps"] == ["Length limits", "URL lists", "Too many toys"]
    assert found["plugins"] == {"toys": {"most": 1}}
    assert found["none"] is False
