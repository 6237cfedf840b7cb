"""The allocator, fixed before the process starts; a module of its own, for it is to start again before torch comes."""

from __future__ import annotations

import os
import platform
import sys

# With glibc's defaults large tensors are given back to the system when they are freed, and each new one costs page
# faults: plain training was 1.6 times slower, and differences drowned.
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": str(2**32), "MALLOC_TRIM_THRESHOLD_": str(2**32)}


def fix_allocator() -> None:
    """Start the program again, with the allocator's environment, unless it is there. Does nothing without glibc."""
    if platform.libc_ver()[0] == "glibc" and not ALLOCATOR.keys() <= os.environ.keys():
        sys.stdout.flush()
        os.execve(sys.executable, sys.orig_argv, {**ALLOCATOR, **os.environ})
