"""exo-kimi runs Moonshot's Kimi K2 family on the Macs its user owns. Importing it loads nothing heavy."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from exo_kimi.runtime.loading.loader import load as load

    __version__: str

__all__ = ["__version__", "load"]


def __getattr__(name: str) -> Any:
    if name == "load":
        from exo_kimi.runtime.loading.loader import load

        return load
    if name == "__version__":
        from importlib.metadata import PackageNotFoundError, version

        try:
            return version("exo-kimi")
        except PackageNotFoundError:  # run from a source tree that is not installed
            return "0+source"
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
