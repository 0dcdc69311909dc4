"""A process that answers containerd's Version call on a unix socket, by grpcio as a server.

python3 containerd_peer.py SOCKET [--config FILE]; prints a line when it listens, ends with its stdin.
"""

import sys
from concurrent.futures import ThreadPoolExecutor

import grpc  # type: ignore[import-untyped]

# VersionResponse{version: "9.9.9", revision: "abc"}, by hand: the reader is what is being tested.
ANSWER = b"\x0a\x059.9.9\x12\x03abc"


class Version(grpc.GenericRpcHandler):  # type: ignore[misc]  # grpc has no types
    def service(self, details: grpc.HandlerCallDetails) -> object:
        if details.method == "/containerd.services.version.v1.Version/Version":
            return grpc.unary_unary_rpc_method_handler(lambda request, context: ANSWER)
        return None


server = grpc.server(ThreadPoolExecutor(1))
server.add_generic_rpc_handlers((Version(),))
server.add_insecure_port(f"unix://{sys.argv[1]}")
server.start()
print(flush=True)
sys.stdin.read()
server.stop(None)
