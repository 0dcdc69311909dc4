"""The program that asks a kubelet what a pod was allocated: FD SECONDS SYSFS SOCKET NAMESPACE NAME DIR...

A process of its own, so that neither gRPC nor YAML stays in the memory of a pod's shim, nor gRPC's threads
in it. DIR: of CDI's files. What it found it writes to the descriptor FD as JSON (kubelet.py reads it). It
must not know what becomes of the devices.
"""

import json
import time
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

from rpc.api import podresources as api
from rpc.codec import Message
from rpc.errors import CasemateError, InvalidArgument, ResourceExhausted, Unavailable, printable
from vfio.allocated import Reader, Reading
from vfio.cdinames import Names

MOST_ANSWER_BYTES = 16 << 20  # what Kubernetes's own clients of it take (test/e2e_node)
MOST_IDS, MOST_LETTERS = 1024, 512  # of a pod's devices, of a name or an id
M = TypeVar("M", bound=Message)
_TOO_MANY_QUESTIONS_S = (0.05, 0.1, 0.2, 0.5, 1.0)  # the kubelet answers 100 a second


def main(argv: list[str]) -> None:
    descriptor, timeout_s, sysfs, socket, namespace, name, *directories = argv
    try:
        pod = ask(socket, namespace, name, float(timeout_s))
        reader = Reader(Names(directories), sysfs)
        answer = {"lines": [_unknown(namespace, name)]} if pod is None else resolved(pod, reader)
    except CasemateError as error:
        answer = {"error": [int(error.code), error.brief, error.details, error.hint]}
    with open(int(descriptor), "w") as file:
        json.dump(answer, file)


def _unknown(namespace: str, name: str) -> str:
    return f"the kubelet has no pod {namespace}/{name}, and so no devices for it"


# --- the kubelet ---


def ask(socket: str, namespace: str, name: str, timeout_s: float) -> api.PodResources | None:
    """None for a pod that the kubelet does not know. Raises Unavailable if it does not say in time."""
    import grpc  # type: ignore[import-untyped]

    until_s = time.monotonic() + timeout_s
    options = [("grpc.enable_http_proxy", 0), ("grpc.max_receive_message_length", MOST_ANSWER_BYTES)]
    with grpc.insecure_channel(f"unix://{socket}", options=options) as channel:
        try:
            wanted = api.GetPodResourcesRequest(pod_name=name, pod_namespace=namespace)
            try:
                got = _call(channel, api.GET, wanted, api.GetPodResourcesResponse, until_s).pod_resources
            except grpc.RpcError as error:
                # Whether a kubelet does not know the pod, or not the question, is in its words alone: the
                # list tells.
                if error.code() not in (grpc.StatusCode.UNKNOWN, grpc.StatusCode.UNIMPLEMENTED):
                    raise
                every = api.ListPodResourcesRequest()
                listed = _call(channel, api.LIST, every, api.ListPodResourcesResponse, until_s)
                return _of_list(listed, namespace, name)
        except grpc.RpcError as error:
            raise _silent(socket, f"{error.code().name}: {printable(error.details() or '', 500)}") from None
        except InvalidArgument as error:
            raise _silent(socket, error.brief) from error
    if got is None or (got.namespace, got.name) != (namespace, name):
        raise _silent(socket, f"asked for pod {namespace}/{name}, it answers of another")
    return got


def _call(channel: Any, method: str, request: Message, answer: type[M], until_s: float) -> M:
    """The decoded answer. Raises grpc.RpcError, and InvalidArgument for what is no such message."""
    import grpc

    call = channel.unary_unary(method, request_serializer=lambda message: message.encode())
    waits = iter(_TOO_MANY_QUESTIONS_S)
    while True:
        try:
            return answer.decode(call(request, timeout=max(until_s - time.monotonic(), 0.001)))
        except grpc.RpcError as error:
            wait_s = next(waits, None) if error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED else None
            if wait_s is None:
                raise
            time.sleep(wait_s)


def _of_list(listed: api.ListPodResourcesResponse, namespace: str, name: str) -> api.PodResources | None:
    """Raises Unavailable where there are two of the name, as one of them ends: whose is what is not said."""
    found = [pod for pod in listed.pod_resources if (pod.namespace, pod.name) == (namespace, name)]
    if len(found) > 1:
        raise Unavailable(f"the kubelet has {len(found)} pods {namespace}/{name}: one has to end first")
    return found[0] if found else None


def _silent(socket: str, why: str) -> Unavailable:
    return Unavailable(
        "the kubelet does not say which devices the pod has",
        f"{socket}: {why}",
        'if no device plugin of this host gives devices of VFIO: vfio.pod_resources = ""',
    )


# --- its answer ---


def resolved(pod: api.PodResources, reader: Reader) -> dict[str, Any]:
    """devices: [container, what it is called, group or None, address] of each; lines: for the pod's log.

    Raises what is wrong with a device of VFIO's, naming it, and ResourceExhausted for more than is believed.
    """
    devices: list[list[object]] = []
    others: dict[tuple[str, str, str], list[str]] = {}
    count = 0
    for container in pod.containers:
        for resource, identifier, is_cdi in _ids(container):
            count += 1
            if count > MOST_IDS or len(resource) > MOST_LETTERS or len(identifier) > MOST_LETTERS:
                raise ResourceExhausted(
                    f"the kubelet has allocated more than {MOST_IDS} devices, or one whose name has more "
                    f"than {MOST_LETTERS} letters"
                )
            called = printable(identifier if is_cdi else f"{resource} {identifier}")
            about = f"device {called}, which the kubelet has for container {container.name[:64]!r}"
            try:
                reading = reader.named(identifier) if is_cdi else reader.device(resource, identifier)
            except CasemateError as error:
                raise type(error)(f"{about}: {error.brief}", error.details, error.hint) from error
            reading = reading or Reading((), "no file of CDI has the name")
            devices += [[container.name, called, part.group, part.address] for part in reading.parts]
            if not reading.parts:
                others.setdefault((container.name, resource, reading.why), []).append(identifier)
    lines = list(_lines(others))
    if lines:
        lines += (printable(f"{path} is not read: {why}", 2048) for path, why in reader.left_out.items())
    return {"devices": devices, "lines": lines}


def _ids(container: api.ContainerResources) -> Iterator[tuple[str, str, bool]]:
    """Resource or claim, id or name of CDI, and which of these it is."""
    for devices in container.devices:
        yield from ((devices.resource_name, identifier, False) for identifier in devices.device_ids)
    for claim in container.dynamic_resources:
        for resource in claim.claim_resources:
            yield from ((claim.claim_name, device.name, True) for device in resource.cdi_devices)


def _lines(others: dict[tuple[str, str, str], list[str]]) -> Iterable[str]:
    for (container, resource, why), ids in others.items():
        named = ", ".join(ids[:8]) + (f" and {len(ids) - 8} more" if len(ids) > 8 else "")
        words = f"{resource} of container {container} ({named}) is not the machine's to have: {why}"
        yield printable(words, 2048)
