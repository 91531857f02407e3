"""The limits of open files of this process: raised as far as they go, and refused where they are too low."""

from __future__ import annotations

import logging
import resource

from exo_kimi.errors import UsageError

WANTED_DESCRIPTORS = 16384
NEEDED_DESCRIPTORS = 4096  # half of them may be connections

log = logging.getLogger(__name__)


def raise_descriptor_limit() -> int:
    """Raise the soft limit of descriptors as far as the hard one allows, to 16384 at most; returns the soft limit.

    Raises:
        UsageError: the hard limit is too low.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < NEEDED_DESCRIPTORS:
        raise UsageError(
            "too few file descriptors for a server and its stages",
            expected=f"a hard limit of at least {NEEDED_DESCRIPTORS}",
            found=hard,
            fix=f"ulimit -Hn {NEEDED_DESCRIPTORS} (as root, or in the service's settings)",
        )
    wanted = WANTED_DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, WANTED_DESCRIPTORS)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        except (ValueError, OSError) as error:  # macOS has a limit of its own below the hard one
            log.info("the limit of descriptors stays at %d: %s", soft, error)
    return descriptor_limit()


def descriptor_limit() -> int:
    """The soft limit of descriptors of this process."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return WANTED_DESCRIPTORS if soft == resource.RLIM_INFINITY else soft
