"""The page's files over HTTP: each is there with the right type, complete in itself, and read again only when it changed."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from pipelines.serving import page
from pipelines.serving.replica import Denoiser

STATIC = Path(page.__file__).parent / "static"
TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
PAGES = {"index.html": "/", "docs.html": "/docs"}
Call = Callable[..., httpx.Response]


def _path(file: Path) -> str:
    return PAGES.get(file.name, f"/static/{file.name}")


@pytest.mark.parametrize("file", sorted(STATIC.iterdir()), ids=lambda file: file.name)
def test_each_file_is_served_as_what_it_is(denoiser: Denoiser, call: Call, file: Path) -> None:
    answer = call(denoiser, "GET", _path(file))
    assert (answer.status_code, answer.content) == (200, file.read_bytes())
    assert answer.headers["content-type"] == f"{TYPES[file.suffix]}; charset=utf-8"
    head = call(denoiser, "HEAD", _path(file))
    assert (head.content, head.headers["etag"]) == (b"", answer.headers["etag"])


def test_a_browser_that_has_a_file_is_not_sent_it_again(denoiser: Denoiser, call: Call) -> None:
    first = call(denoiser, "GET", "/static/main.js")
    assert first.headers["cache-control"] == "no-cache"  # it asks before it uses the one that it has
    again = call(denoiser, "GET", "/static/main.js", headers={"If-None-Match": first.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")
    other = call(denoiser, "GET", "/static/main.js", headers={"If-None-Match": '"another"'})
    assert other.content == first.content


def test_what_a_file_refers_to_is_there_and_nowhere_else() -> None:
    """The page works without a network, and under any prefix: no address but relative ones."""
    known = {file.name for file in STATIC.iterdir()}
    found = set()
    for file in STATIC.iterdir():
        text = file.read_text(encoding="utf-8")
        assert not re.search(r"""(src|href)=["']?/|["'(]//|@import|url\(""", text), file.name
        assert set(re.findall(r"https?://[^'\" ]*", text)) <= {"http://www.w3.org/2000/svg"}, file.name
        found |= {Path(name).name for name in re.findall(r"""(?:from|import) "(\./[^"]+)";""", text)}
        found |= {Path(name).name for name in re.findall(r"""(?:src|href)="(static/[^"]+)""", text)}
    assert found == known - PAGES.keys()


def test_a_page_with_a_slash_behind_it_leads_to_the_page(denoiser: Denoiser, call: Call) -> None:
    """Below it, the files that it refers to would not be found. The address is relative: there may be a prefix before it."""
    for path, where in (("/docs/", "../docs"), ("/docs//", "../../docs")):
        answer = call(denoiser, "GET", path)
        assert (answer.status_code, answer.headers["location"]) == (308, where)
    assert call(denoiser, "GET", "/").status_code == 200
    assert call(denoiser, "GET", "/v1/models/").status_code == 200


def test_other_names_below_static_are_not_there(denoiser: Denoiser, call: Call) -> None:
    for path in ("/static", "/static/index.html", "/static/../page.py", "/static/%2e%2e/page.py"):
        assert call(denoiser, "GET", path).status_code == 404, path
