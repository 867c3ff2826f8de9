"""The page at / and the files that it consists of (static/): plain HTML, CSS and JavaScript, no build, nothing from elsewhere."""

from __future__ import annotations

import hashlib
from pathlib import Path

from fastapi import FastAPI, Request, Response

_STATIC = "/static/"  # open to strangers (keys.py)
_READ = ["GET", "HEAD"]
PAGES = {"index.html": "/", "docs.html": "/docs"}
_FOLDER = Path(__file__).parent / "static"
# Not from `mimetypes`, which reads a machine's own tables: a module of another type is not run.
_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
# The page asks this endpoint alone, whatever a model writes into it.
_POLICY = "default-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"


def add_page(api: FastAPI) -> None:
    """Let `api` answer /, /docs (a page of /openapi.json) and /static/NAME."""
    for path in sorted(_FOLDER.iterdir()):
        if path.suffix in _TYPES:
            where = PAGES.get(path.name, _STATIC + path.name)
            api.api_route(where, methods=_READ, include_in_schema=False)(_File(path))


class _File:
    """A file, read once. Browsers ask each time whether theirs is the same (a page and its modules change together)."""

    def __init__(self, path: Path) -> None:
        self._content = path.read_bytes()
        self._headers = {
            "Content-Type": f"{_TYPES[path.suffix]}; charset=utf-8",
            "Cache-Control": "no-cache",
            "ETag": f'"{hashlib.sha256(self._content).hexdigest()[:16]}"',
            "Content-Security-Policy": _POLICY,
            "X-Content-Type-Options": "nosniff",
        }

    async def __call__(self, request: Request) -> Response:
        asked = request.headers.get("if-none-match", "")
        if self._headers["ETag"] in asked:
            return Response(status_code=304, headers=self._headers)
        return Response(self._content, headers=self._headers)
