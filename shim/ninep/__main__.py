"""The file server of one pod, a process of its own: --socket-fd=N --most-files=N DIRECTORY.

Connections come by the socket N, as descriptors; each is a client's, and has a thread. Ends when nobody holds
the other end of the socket any more.
"""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))

from shim.ninep.process import run

if __name__ == "__main__":
    run(sys.argv[1:])
