"""Limit of the files that this process may have open.

Too few are reported before anything has begun: a library that meets the limit may try again without end.
"""

import resource

ENOUGH_FILES = 65_536


def check_open_files(*, num_workers: int, world_size: int) -> None:
    """Raise the limit of this process as far as it is allowed. Raises ValueError if that is not far enough."""
    # Gloo connects each rank with all others, on whichever machine: in three groups, and rank 0 holds the store.
    needed = 32 + 8 * num_workers + 4 * (world_size - 1)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    allowed = ENOUGH_FILES if hard == resource.RLIM_INFINITY else min(hard, ENOUGH_FILES)
    if soft != resource.RLIM_INFINITY and soft < allowed:
        resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
    if allowed < needed:
        raise ValueError(
            f"the limit of open files is {allowed} (ulimit -Hn), but {num_workers} loader workers and "
            f"{world_size} ranks need {needed}; raise it (ulimit -n {max(4096, needed)}, limits.conf), or set "
            f"fewer data.num_workers."
        )
