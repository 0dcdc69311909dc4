"""The kernel's clock for the times of files, which goes in steps of some milliseconds.

Since Linux 6.13 the next change of a file that was asked for its time has the precise one, and no later
change of any file an earlier one: that is ahead of the steps, by more than one where these are late.
"""

import time

CLOCK_REALTIME_COARSE = 5  # linux/time.h


def next_tick() -> None:
    """What is written from now on has other times than what was written before."""
    before = time.time_ns()
    while time.clock_gettime_ns(CLOCK_REALTIME_COARSE) <= before:
        time.sleep(0.001)
