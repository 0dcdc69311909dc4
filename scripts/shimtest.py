"""`make shimtest`: install what the tests need, then become tests/shimtest, which runs containerd's suite."""

import sys

from scripts.test import become

if __name__ == "__main__":
    become("tests.shimtest", sys.argv[1:])
