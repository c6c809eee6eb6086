"""How much memory this process has held at most."""

import re
import resource
from contextlib import suppress
from pathlib import Path


def peak_memory_bytes() -> int:
    """Bytes that were resident at once, since this program began.

    Linux counts in ru_maxrss what the parent held when it started this process; VmHWM begins with the
    program.
    """
    with suppress(OSError):
        found = re.search(r"^VmHWM:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
        if found:
            return int(found[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
