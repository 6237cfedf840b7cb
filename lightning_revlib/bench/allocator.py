"""The allocator of a benchmark, fixed before the process starts.

The module is separate because the program starts again before torch is imported.
"""

from __future__ import annotations

import os
import platform
import sys

# With glibc's defaults, large tensors are returned to the system when they are freed, and each new one causes page
# faults. Plain training was 1.6 times slower, which hid the differences between contestants.
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": str(2**32), "MALLOC_TRIM_THRESHOLD_": str(2**32)}


def fix_allocator() -> None:
    """Start the program again with the allocator's environment, unless it is set. Does nothing without glibc."""
    if platform.libc_ver()[0] == "glibc" and not ALLOCATOR.keys() <= os.environ.keys():
        sys.stdout.flush()
        os.execve(sys.executable, sys.orig_argv, {**ALLOCATOR, **os.environ})
