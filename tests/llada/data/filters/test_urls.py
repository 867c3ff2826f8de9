import gzip
import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llada.data.document import Document
from llada.data.filters.urls import UrlFilter, UrlLists
from llada.data.filters.view import TextView
from llada.errors import UserError


@pytest.fixture(scope="module")
def url_lists(tmp_path_factory) -> UrlLists:
    folder = tmp_path_factory.mktemp("lists")
    lists = {
        "domains": "# a comment\n\nexample.co.uk\nWWW.Bad.org\nhttp.net\nbücher.example\n  spaced.net \r\n",
        "pages": "host.com/~joe\nhttps://www.host.com/Folder/\nhost.com/item?id=5\nroot.com\n",
        "banned_words": "Casino\nfree-bets\n",
        "soft_words": "win\nbonus\nslots\n",
        "banned_subwords": "xyzzy\n--\n",
    }
    urls = {}
    for name, text in lists.items():
        path = folder / f"{name}.txt"
        path.write_text(text, encoding="utf-8")
        urls[name] = (str(path),)
    return UrlLists(UrlFilter(**urls))


@pytest.mark.parametrize(
    ("url", "rule", "value"),
    [
        ("http://example.co.uk", "domain", "example.co.uk"),
        ("https://sub.sub.Example.CO.uk:8080/a?b#c", "domain", "example.co.uk"),
        ("//example.co.uk./", "domain", "example.co.uk"),
        ("http://user:word@www.example.co.uk/", "domain", "example.co.uk"),
        ("http://bad.org/x", "domain", "bad.org"),
        ("bad.org", "domain", "bad.org"),
        ("http://bücher.example/", "domain", "xn--bcher-kva.example"),
        ("http://xn--bcher-kva.example/", "domain", "xn--bcher-kva.example"),
        ("http://a.spaced.net", "domain", "spaced.net"),
        ("http://host.com/~joe", "page", "host.com/~joe"),
        ("https://www.host.com/~joe/", "page", "host.com/~joe"),
        ("http://HOST.com:80/~joe/a/b.html?c", "page", "host.com/~joe"),
        ("http://host.com/Folder/x", "page", "host.com/Folder"),
        ("http://host.com/item?id=5&page=2", "page", "host.com/item?id=5"),
        ("http://root.com/", "page", "root.com"),
        ("http://fine.com/CASINO-night", "banned_word", "casino"),
        ("http://casino.fine.com/", "banned_word", "casino"),
        ("http://fine.com/freebets/", "banned_word", "freebets"),
        ("http://fine.com/win-a-bonus", "soft_words", "bonus win"),
        ("http://fine.com/xy-zz_y", "banned_subword", "xyzzy"),
    ],
)
def test_refused(url_lists, url, rule, value):
    verdict = url_lists.verdict(url)
    assert verdict is not None
    assert (verdict.rule, verdict.value) == (f"url.{rule}", value)


@pytest.mark.parametrize(
    "url",
    [
        "http://notexample.co.uk/",
        "http://co.uk/",
        "http://example.co.uk.evil.com/",
        "http://fine.com/example.co.uk",
        "http://host.com/",
        "http://host.com/~joey",
        "http://sub.host.com/~joe",
        "http://host.com/folder/x",
        "http://host.com/item?id=55",
        "http://root.com/page",
        "http://fine.com/casinos",
        "http://fine.com/win-win-win",
        "",
        "http://[::1]:80/x",
        "not a url at all",
    ],
)
def test_kept(url_lists, url):
    assert url_lists.verdict(url) is None


@given(st.text(max_size=80))
def test_whatever_follows_it_a_blocked_domain_is_blocked(url_lists, url):
    """And any other URL, however broken, is answered: kept, or refused for something that is on a list."""
    assert url_lists.verdict(f"http://example.co.uk/{url}") == ("url.domain", "example.co.uk", None)
    assert url_lists.verdict(f"https://a.example.co.uk?{url}") == ("url.domain", "example.co.uk", None)
    for odd in (url, "http://" + url):
        verdict = url_lists.verdict(odd)
        assert verdict is None or verdict.value


def test_without_lists_everything_is_kept():
    assert UrlLists(UrlFilter()).verdict("http://example.com/") is None


def test_the_threshold_of_soft_words(tmp_path):
    (tmp_path / "soft").write_text("a\nb\nc\n")
    config = UrlFilter(soft_words=(str(tmp_path / "soft"),), soft_word_threshold=3)
    assert UrlLists(config).verdict("http://x.org/a/b/a") is None
    assert UrlLists(config).verdict("http://x.org/a/b/c") == ("url.soft_words", "a b c", 3)
    with pytest.raises(UserError, match="soft_word_threshold must be at least 1"):
        UrlFilter(soft_word_threshold=0)


def test_lists_from_s3_compressed_and_several(s3_url, tmp_path):
    import fsspec

    with fsspec.open(f"{s3_url}/urls/domains.txt.gz", "wb") as stream:
        stream.write(gzip.compress(b"one.com\n"))
    (tmp_path / "more.txt").write_text("two.com\n")
    url_lists = UrlLists(UrlFilter(domains=(f"{s3_url}/urls/domains.txt.gz", str(tmp_path / "more.txt"))))
    assert url_lists.verdict("http://a.one.com/")
    assert url_lists.verdict("http://two.com/")
    assert not url_lists.verdict("http://three.com/")


def test_a_list_that_cannot_be_read_is_named(tmp_path):
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match=r"binary is not UTF-8 text .*: give one entry a line"):
        UrlLists(UrlFilter(pages=(str(tmp_path / "binary"),)))
    with pytest.raises(UserError, match="no URL list at .*nowhere"):
        UrlLists(UrlFilter(pages=(str(tmp_path / "nowhere"),)))


def test_an_entry_takes_eight_bytes(tmp_path):
    count = 50_000
    (tmp_path / "domains").write_text("".join(f"site-{i}.example.com\n" for i in range(count)))
    config = UrlFilter(domains=(str(tmp_path / "domains"),))
    UrlLists(config)  # modules and file systems are loaded once
    tracemalloc.start()
    url_lists = UrlLists(config)
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert held < 10 * count
    assert all(url_lists.verdict(f"http://a.site-{i}.example.com/") for i in (0, 1, count // 2, count - 1))
    assert not url_lists.verdict(f"http://site-{count}.example.com/")


def test_documents_without_a_url_pass_and_the_lists_are_read_once(tmp_path):
    path = tmp_path / "domains"
    path.write_text("bad.org\n")
    settings = UrlFilter(domains=(str(path),), pages=(f"{path}.pages",))
    document, view = Document("text", "x:1"), TextView("text")
    assert settings(document, view) == (document, None, {})  # no list is asked for
    assert settings.files() == [str(path), f"{path}.pages"]
    settings = UrlFilter(domains=(str(path),))
    bad = Document("text", "x:1", url="http://a.bad.org/")
    assert settings(bad, view).verdict == ("url.domain", "bad.org", None)
    path.unlink()
    assert settings(bad, view).verdict
