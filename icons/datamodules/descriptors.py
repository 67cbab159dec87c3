"""Open files: workers that run out of them wait for one another without end, so that they are counted before."""

import importlib

_OWN, _OF_A_WORKER = 40, 12  # files and pipes that were open at once, rounded up


def check_descriptors(num_workers: int) -> None:
    """Has as many files allowed as workers need, where the system lets the process allow itself more.

    Raises:
        ValueError: it does not.
    """
    try:
        resource = importlib.import_module("resource")
    except ModuleNotFoundError:  # Windows, which has no such limit
        return
    needed = _OWN + _OF_A_WORKER * num_workers
    allowed, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    if num_workers == 0 or allowed == resource.RLIM_INFINITY or allowed >= needed:
        return
    if most != resource.RLIM_INFINITY and most < needed:
        raise ValueError(
            f"--num-workers {num_workers}: needs {needed} open files, and this process may have {most}; expected more "
            f"(`ulimit -n {needed}`), or fewer workers"
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (needed, most))
