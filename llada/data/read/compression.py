"""Incremental decompression of gzip and zstd, one compressed member (frame) at a time."""

from __future__ import annotations

import zlib
from typing import Any


def decompressor(compression: str) -> Any:
    """An object with `decompress(data)`, `eof` and `unused_data` for one member of "gzip" or "zstd" data."""
    if compression == "gzip":
        return zlib.decompressobj(wbits=31)
    try:
        import zstandard
    except ImportError:
        raise ImportError("reading .zst files needs the package zstandard: pip install zstandard") from None
    return zstandard.ZstdDecompressor().decompressobj()


def is_damage(error: Exception) -> bool:
    """True when `error`, raised by a decompressor, says that the data are damaged."""
    return isinstance(error, zlib.error) or type(error).__name__ == "ZstdError"
