"""Makes plain `lm_eval` know the model "llada".

Later versions of lm_eval look for the entry points "lm_eval.models" (pyproject.toml) themselves. 0.4.13 looks for none, so there
llada_lm_eval.pth has each Python of the environment call `install`. Imports nothing, for all of them wait for it.
"""

from __future__ import annotations

import sys

TYPE_CHECKING = False  # see llada/__init__.py
if TYPE_CHECKING:
    from types import ModuleType
    from typing import Any


def install() -> None:
    """Register the model as soon as lm_eval's own are."""
    sys.meta_path.insert(0, _BehindModels)


class _BehindModels:
    """Finds `lm_eval.models`, once, as whoever is asked next finds it, and registers the model when it is imported."""

    @classmethod
    def find_spec(cls, name: str, path: Any = None, target: Any = None) -> Any:
        if name != "lm_eval.models":
            return None
        from importlib.util import find_spec

        sys.meta_path.remove(cls)
        spec = find_spec(name)
        if spec and spec.loader:
            run = spec.loader.exec_module

            def run_and_register(module: ModuleType) -> None:
                run(module)
                _register()

            spec.loader.exec_module = run_and_register  # type: ignore[method-assign]
        return spec


def _register() -> None:
    from lm_eval.api.registry import model_registry

    if "llada" not in model_registry:
        model_registry.register("llada", target="llada.evals.harness:HarnessModel")
