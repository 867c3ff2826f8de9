import codecs
import re
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llada.data.document import text_problem
from llada.data.read.extraction import decode_html, extract_text
from llada.data.read.warc import Page, read_pages
from llada.errors import UserError

ARTICLE = "".join(
    f"<p>Paragraph number {i} of the article says something long enough to count as its content, with a "
    f"<a href='/x'>link</a> inside it and a second sentence after the first one.</p>"
    for i in range(6)
)
PAGE = f"""<!DOCTYPE html><html><head><title>A title</title><style>p {{}}</style></head><body>
<nav><ul><li><a href="/">Home</a></li><li><a href="/about">About navigation</a></li></ul></nav>
<div id="page"><main><article><h1>The headline</h1>{ARTICLE}<ul><li>An item of a list that belongs to it</li>
<li>And a second item that belongs to the article, and is written out in full</li></ul>{ARTICLE}</article></main></div>
<div class="comments" id="comments"><p>A comment by a reader, who has an opinion about all of this.</p></div>
<footer><p>Copyright footer</p></footer><script>var tracking = 1;</script></body></html>"""


@pytest.mark.parametrize("extractor", ["resiliparse", "trafilatura"])
def test_the_article_is_kept_and_what_surrounds_it_is_not(extractor):
    text = extract_text(PAGE, extractor)
    for i in range(6):
        assert re.search(
            rf"^Paragraph number {i} .* with a link inside it .* first one\.$", text, re.MULTILINE
        )
    assert "The headline" in text
    assert "An item of a list" in text
    for unwanted in ("Home", "About navigation", "tracking", "Copyright", "comment by a reader", "p {}", "<"):
        assert unwanted not in text


@pytest.mark.parametrize("extractor", ["resiliparse", "trafilatura"])
@pytest.mark.parametrize(
    "html", ["", "   ", "<html></html>", "<script>x</script>", "<html><body></body></html>"]
)
def test_a_page_without_text(extractor, html):
    assert extract_text(html, extractor) == ""


@pytest.mark.parametrize("extractor", ["resiliparse", "trafilatura"])
def test_chinese_and_korean_pages(extractor):
    for sentence in (
        "这是一篇关于天气的文章，内容足够长，可以算作正文。",
        "이것은 날씨에 관한 글이며 본문으로 볼 만큼 충분히 깁니다. ",
    ):
        html = f"<html><body><article>{''.join(f'<p>{sentence * 4}</p>' for _ in range(4))}</article></body></html>"
        assert sentence.strip() in extract_text(html, extractor)


def test_a_page_nested_too_deep_is_refused_before_it_takes_hours():
    deep = "<html><body>" + "<div>" * 500_000 + f"<p>{'word ' * 50}</p>"
    with pytest.raises(ValueError, match="nested more than 1000 deep"):
        extract_text(deep)
    assert extract_text(f"<html><body>{'<div>' * 500}<p>{'word ' * 50}</p>").count("word") == 50
    assert isinstance(extract_text("<a" * 500_000), str)  # and the guard itself takes no quadratic time
    siblings = "<html><body><main>" + "<div><p>Some words of a paragraph</p></div>" * 3000
    assert extract_text(siblings).count("Some words") == 3000
    unclosed = "<html><body><main>" + "".join(
        f"<p>Paragraph {i} has words<br><img src=x>" for i in range(2000)
    )
    assert extract_text(unclosed).count("Paragraph") == 2000


@given(st.text(alphabet=st.sampled_from("<>/abdiv p=\"'&;#x0!-[]\x00é中"), max_size=300))
def test_broken_html_gives_a_text_or_nothing(html):
    """What comes out is a sound text without tags of its own; what stood before the damage is not lost to it."""
    text = extract_text(html)
    assert text_problem(text) in (None, "empty_text")
    whole = f"<html><body><main><p>{'Sound words before. ' * 5}</p></main>{html}"
    assert "Sound words before." in extract_text(whole)


def test_an_extractor_that_is_not_there(monkeypatch):
    with pytest.raises(ValueError, match="no extractor 'boilerpipe'; choose one of resiliparse, trafilatura"):
        extract_text(PAGE, "boilerpipe")
    monkeypatch.setitem(sys.modules, "trafilatura", None)
    with pytest.raises(UserError, match="pip install trafilatura lxml_html_clean"):
        extract_text(PAGE, "trafilatura")


def html(text: str, meta: str = "") -> str:
    return f"<html><head>{meta}</head><body>{text}</body></html>"


@pytest.mark.parametrize(
    ("text", "encoding", "meta", "charset"),
    [
        ("café “x” 中", "utf-8", "", None),
        ("café “x” 中", "utf-8", '<meta charset="iso-8859-1">', "iso-8859-1"),  # a lie
        ("café €“x”", "cp1252", "", "ISO-8859-1"),  # as browsers read it
        ("café €“x”", "cp1252", '<meta charset="iso-8859-1">', None),
        ("中文网页的内容", "gb18030", "", "gb2312"),
        (
            "中文网页的内容㐀",
            "gb18030",
            '<meta http-equiv="Content-Type" content="text/html; charset=gb2312">',
            None,
        ),
        ("日本語の文章です", "shift_jis", '<meta charset="Shift_JIS">', None),
        ("日本語の文章です", "iso2022_jp", "", "iso-2022-jp"),
        ("日本語の文章です", "euc_jp", '<meta charset="euc-jp">', "no-such-charset"),
        ("한국어 문장입니다", "cp949", '<meta charset="euc-kr">', None),
        ("Привет, мир", "koi8-r", "", "KOI8-R"),
        ("Привет, мир", "cp1251", '<meta charset="utf-8">', "utf-8"),  # both lie
        ("Привет, мир", "cp1251", '<meta charset="windows-1251">', "iso-8859-1"),  # the server's default
        ("Привет, мир", "cp1251", "", "iso-8859-1"),
        ("Ελληνικά κείμενα", "cp1253", '<meta charset="windows-1253">', "utf-8"),
        ("日本語の文章です", "shift_jis", '<meta charset="Shift_JIS">', "iso-8859-1"),
        ("中文网页的内容", "gb18030", '<meta charset="gb2312">', "windows-1252"),
        ("한국어 문장입니다", "cp949", '<?xml version="1.0" encoding="euc-kr"?>', "iso-8859-1"),
        ("日本語の文章です", "euc_jp", "", "iso-8859-1"),
        ("日本語の文章です", "shift_jis", "", "windows-1252"),
        ("這是一個關於大海的文章", "big5hkscs", "", "iso-8859-1"),
        ("한국어 문장입니다", "cp949", "", "iso-8859-1"),
        ("한국어 문장입니다", "cp949", "", None),
        ("Привет, мир моря и кораблей", "koi8-r", "", "windows-1251"),
        ("L'élève a vécu près de la forêt", "cp1252", "", "windows-1251"),
        ("Größe, façade — “x” ————", "cp1252", "", "windows-1252"),
        ("Menu »»»» item ···· ©©©© ©2020 £10 ½ °C, nº 1ª €", "cp1252", "", "windows-1252"),
        ("Größe", "utf-16-le", "", None),
        ("Größe", "utf-16-be", "", "utf-8"),
        ("Größe", "utf-16-le", '<meta charset="utf-8">', "utf-16"),
    ],
)
def test_encodings(text, encoding, meta, charset):
    if not meta or encoding in ("cp1251", "shift_jis", "cp949"):
        text = f"{text} " * 20  # it must be guessed
    assert decode_html(html(text, meta).encode(encoding), charset) == html(text, meta)


def test_utf_8_with_a_few_bad_bytes_stays_utf_8():
    page = html("Größe, façade, 中文 " * 50)
    cut = page.encode()[: page.encode().rfind("文".encode()) + 1]
    assert decode_html(cut, "iso-8859-1") == page[: page.rfind("文")] + "\ufffd"
    mixed = html("Größe, façade, 中文 " * 50 + "caf\udce9").encode("utf-8", "surrogateescape")
    assert decode_html(mixed, None) == html("Größe, façade, 中文 " * 50 + "caf\ufffd")
    assert decode_html("\ufffd".encode() * 50 + b"x") == "\ufffd" * 50 + "x"  # as it was written


def test_byte_order_marks_come_first():
    for mark, encoding in (
        (codecs.BOM_UTF8, "utf-8"),
        (codecs.BOM_UTF16_LE, "utf-16-le"),
        (codecs.BOM_UTF16_BE, "utf-16-be"),
    ):
        assert decode_html(mark + html("é中").encode(encoding), "iso-8859-1") == html("é中")


@given(
    st.binary(max_size=200), st.sampled_from([None, "utf-8", "gbk", "utf-7", "rot13", "hex", "latin1", "x"])
)
def test_any_bytes_become_text(data, charset):
    assert isinstance(decode_html(data, charset), str)


def test_the_extractors_agree_on_real_pages(shared_dir):
    """Most words that trafilatura keeps, resiliparse keeps too."""
    with open(shared_dir / "data/web/sample.warc.gz", "rb") as stream:
        pages = [page for _, page in read_pages(stream, "gzip", 1 << 24) if isinstance(page, Page)]
    covered = total = 0
    for page in pages:
        html = decode_html(page.html, page.charset)
        fast, precise = (re.findall(r"\w+", extract_text(html, e)) for e in ("resiliparse", "trafilatura"))
        assert len(fast) > 40
        total += len(precise)
        covered += sum(min(fast.count(word), precise.count(word)) for word in set(precise))
    assert covered / total > 0.9
