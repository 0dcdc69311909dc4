"""`make posix`: install what tests of file systems need, then become tests/posix, which runs them."""

import sys

from scripts.test import become

if __name__ == "__main__":
    become("tests.posix", sys.argv[1:])
