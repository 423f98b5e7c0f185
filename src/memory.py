"""Memory of CPU trainings."""

import ctypes
import sys

# From glibc's malloc.h.
M_TRIM_THRESHOLD = -1
M_MMAP_MAX = -4


def keep_freed_memory() -> None:
    """Has glibc keep freed blocks instead of handing them back to the kernel.

    Large activations come and go each step; a block of 32 MiB or more would be returned and faulted in again,
    page by page, at about a tenth of the speed of warm memory. Does nothing where the C library is another.
    """
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        if hasattr(libc, "mallopt") and hasattr(libc, "gnu_get_libc_version"):
            libc.mallopt(M_MMAP_MAX, 0)
            libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
