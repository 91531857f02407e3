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
            found = version("exo-kimi")
        except PackageNotFoundError:  # run from a source tree that is not installed
            found = "0+source"
        globals()[name] = found  # read once: a server is asked often, also when it has no descriptor left
        return found
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
