"""What the tests of several readers share."""

from __future__ import annotations

import pytest

from llada.data.outcomes import Rejects
from llada.data.read.documents import read_documents
from llada.data.read.listing import list_inputs
from llada.data.read.parts import Part, ReadOptions


@pytest.fixture(scope="session")
def read():
    """read(path, **options): (texts, rejects) of a whole file, or of a piece of it."""

    def read_file(path, **options):
        (file,) = list_inputs([str(path)])
        rejects = Rejects()
        part = Part(file, file.size, options.pop("start", 0), options.pop("end", None))
        settings = ReadOptions(**{"max_record_bytes": 1 << 20} | options)
        return [document.text for document in read_documents(part, rejects, settings)], rejects

    return read_file
