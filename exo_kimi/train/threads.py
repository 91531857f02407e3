"""NumPy's own threads while a training runs: none; it knows nothing of the training."""

from __future__ import annotations

from contextlib import AbstractContextManager

from exo_kimi.errors import UsageError


def one_blas_thread() -> AbstractContextManager[object]:
    """Products of matrices on the calling thread alone, for as long as the context lasts.

    The trainer's workers fill the cores. BLAS threads beside them wait for each other by spinning (20 times slower on a busy
    machine of 2 cores), and split sums as the load of the moment has it: the same seed would not give the same weights.

    Raises:
        UsageError: threadpoolctl is not installed.
    """
    try:
        from threadpoolctl import threadpool_limits
    except ImportError:
        raise UsageError(
            "training needs threadpoolctl",
            found="not installed",
            fix="install the extra: pip install 'exo-kimi[train]'",
        ) from None
    limits: AbstractContextManager[object] = threadpool_limits(limits=1, user_api="blas")
    return limits
