"""Compressed files: which a name promises, and incremental decompression, one member (frame) at a time."""

from __future__ import annotations

import os
import zlib
from typing import Any

from llada.errors import UserError

COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}


def split_compression(url: str) -> tuple[str, str | None]:
    """(the URL in lower case without its compression's suffix, None | "gzip" | "zstd")."""
    stem, suffix = os.path.splitext(url.lower())
    compression = COMPRESSIONS.get(suffix)
    return (stem, compression) if compression else (url.lower(), None)


def decompressor(compression: str) -> Any:
    """An object with `decompress(data)`, `eof` and `unused_data` for one member of "gzip" or "zstd" data."""
    if compression == "gzip":
        return zlib.decompressobj(wbits=31)
    try:
        import zstandard
    except ImportError:
        raise UserError("reading .zst files needs the package zstandard: pip install zstandard") from None
    return zstandard.ZstdDecompressor().decompressobj()


def is_damage(error: Exception) -> bool:
    """True when `error`, raised by a decompressor, says that the data are damaged."""
    return isinstance(error, zlib.error) or type(error).__name__ == "ZstdError"
