"""llada/data/read/text.py"""


def test_text_files(tmp_path, read):
    (tmp_path / "one.txt").write_bytes(b"\xef\xbb\xbfa whole\r\nbook\n")
    (tmp_path / "many.txt").write_bytes(b"first\n<|endoftext|>\nsecond<|endoftext|>\n")
    assert read(tmp_path / "one.txt")[0] == ["a whole\r\nbook\n"]
    assert read(tmp_path / "many.txt")[0] == ["first\n", "\nsecond"]
