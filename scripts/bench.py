"""`make bench`: installs what measuring needs, then becomes bench/, which writes docs/performance.md."""

import sys

from scripts.test import become

if __name__ == "__main__":
    become("bench", sys.argv[1:])
