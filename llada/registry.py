"""Doors: tables of named things (readers, filters, unmasking rules, cache modes) to which a row can be added from outside.

Inside this repository a new entry is a new file and a row of its table. Outside, a module that calls `register` is
enough: $LLADA_PLUGINS names such modules ("my_filters,my_rules"), and every process that looks something up (the
command, Ray's workers, a serving replica) imports them first. On a standing cluster the variable belongs into the cluster
file's `runtime_env.env_vars`.
"""

from __future__ import annotations

import functools
import importlib
import os
from collections.abc import Callable, Iterator, Mapping
from typing import TypeVar

from llada.errors import UserError, hint

T = TypeVar("T")


class Registry(Mapping[str, T]):
    """A table of entries by name. `noun` is what an entry is called in errors."""

    def __init__(self, noun: str, entries: Mapping[str, T]) -> None:
        self.noun = noun
        self._entries = dict(entries)

    def register(self, name: str) -> Callable[[T], T]:
        """A decorator that adds an entry. Raises ValueError when the name is taken."""

        def add(entry: T) -> T:
            if name in self._entries:
                raise ValueError(f"there is a {self.noun} {name!r} already")
            self._entries[name] = entry
            return entry

        return add

    def find(self, name: str) -> T:
        """The entry of that name. Raises UserError naming the nearest one."""
        try:
            return self[name]
        except KeyError:
            raise UserError(f"there is no {self.noun} {name!r}; {hint(name, self._entries)}") from None

    def __getitem__(self, name: str) -> T:
        # Ours first: they are looked up while our own modules are imported, which a plugin would import again.
        if name not in self._entries:
            load_plugins()
        return self._entries[name]

    def __iter__(self) -> Iterator[str]:
        load_plugins()
        return iter(self._entries)

    def __len__(self) -> int:
        load_plugins()
        return len(self._entries)


@functools.cache
def load_plugins() -> None:
    """Import the modules that $LLADA_PLUGINS names, once per process. Raises UserError naming one that is not there."""
    for name in filter(None, map(str.strip, os.environ.get("LLADA_PLUGINS", "").split(","))):
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as error:
            if not f"{name}.".startswith(f"{error.name}."):  # a module that the plugin itself imports
                raise
            raise UserError(
                f"LLADA_PLUGINS names the module {name!r}, which is not on the PYTHONPATH"
            ) from None
