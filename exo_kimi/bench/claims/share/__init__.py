"""`share` and `pull --from` against a plain socket copy, between two network namespaces."""

from exo_kimi.bench.claims.share.run import main

__all__ = ["main"]
