"""A process that answers as the PodResources API of a kubelet does, by grpcio as a server.

python3 kubelet_peer.py SOCKET ANSWERS: says a line when it listens and at each call, ends with its stdin.
ANSWERS is a file, read at each call: by the method's last name (Get, List) {"hex": an encoded message},
{"code": ..., "details": ...}, {"hang": true}, and with "busy": n the first n calls are too many. What it was
asked is appended to ANSWERS with the suffix .asked.
"""

import json
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc  # type: ignore[import-untyped]

SERVICE = "/v1.PodResourcesLister/"


class Kubelet(grpc.GenericRpcHandler):  # type: ignore[misc]  # grpc has no types
    def __init__(self, answers: Path) -> None:
        self._answers = answers
        self._busy = 0

    def service(self, details: Any) -> object:
        method = details.method.removeprefix(SERVICE)
        return grpc.unary_unary_rpc_method_handler(
            lambda request, context: self._answer(method, request, context)
        )

    def _answer(self, method: str, request: bytes, context: Any) -> bytes:
        with self._answers.with_suffix(".asked").open("a") as file:
            file.write(f"{method} {request.hex()}\n")
        print(method, flush=True)
        answer = json.loads(self._answers.read_text()).get(method) or {
            "code": "UNIMPLEMENTED",
            "details": method,
        }
        if self._busy < answer.get("busy", 0):
            self._busy += 1
            context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "rejected by rate limit")
        if "code" in answer:
            context.abort(grpc.StatusCode[answer["code"]], answer["details"])
        if "hang" in answer:
            gone = threading.Event()
            context.add_callback(gone.set)
            gone.wait()
        return bytes.fromhex(answer.get("hex", ""))


if __name__ == "__main__":
    server = grpc.server(ThreadPoolExecutor(4), options=[("grpc.max_send_message_length", -1)])
    server.add_generic_rpc_handlers((Kubelet(Path(sys.argv[2])),))
    server.add_insecure_port(f"unix://{sys.argv[1]}")
    server.start()
    print(flush=True)
    sys.stdin.read()
    server.stop(None)
