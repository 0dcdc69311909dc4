"""The kernel's clock for the times of files, which goes in steps of some milliseconds before Linux 6.13."""

import time

CLOCK_REALTIME_COARSE = 5  # linux/time.h


def next_tick() -> None:
    """What is written from now on has other times than what was written before."""
    before = time.clock_gettime_ns(CLOCK_REALTIME_COARSE)
    while time.clock_gettime_ns(CLOCK_REALTIME_COARSE) == before:
        time.sleep(0.001)
