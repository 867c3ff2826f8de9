"""llada/data/read/parquet.py"""

import pyarrow as pa
import pyarrow.parquet as pq


def test_damaged_parquet(tmp_path, read):
    path = tmp_path / "a.parquet"
    pq.write_table(
        pa.table({"text": [f"{i}" * 50 for i in range(300)]}), path, row_group_size=100, compression="zstd"
    )
    data = path.read_bytes()
    offset = pq.ParquetFile(path).metadata.row_group(1).column(0).dictionary_page_offset
    path.write_bytes(data[: offset + 30] + bytes(200) + data[offset + 230 :])
    texts, rejects = read(path)
    assert texts == [f"{i}" * 50 for i in [*range(100), *range(200, 300)]]
    assert dict(rejects.counts) == {"damaged_row_group": 100}
    path.write_bytes(data[:-100])
    texts, rejects = read(path)
    assert not texts
    assert dict(rejects.counts) == {"damaged_file": 1}
    assert str(path) in rejects.examples[0]["source"]


def test_parquet_rows_with_bad_text(tmp_path, read):
    path = tmp_path / "a.parquet"
    # A string column whose second value is no UTF-8.
    column = pa.Array.from_buffers(
        pa.string(), 2, [None, pa.py_buffer(b"\0\0\0\0\1\0\0\0\2\0\0\0"), pa.py_buffer(b"a\xff")]
    )
    pq.write_table(pa.table({"text": pa.concat_arrays([column, pa.array(["b", None])])}), path)
    texts, rejects = read(path)
    assert texts == ["a", "b"]
    assert dict(rejects.counts) == {"not_utf8": 1, "null_text": 1}
    assert read(path, text_field="body")[1].counts == {"missing_text": 4}
