"""What of the shim's binary contract needs more than `start` does: `delete`, `-info`, BootstrapResult.

Apart from bootstrap.py so that a plain `start` does not pay for the imports, and each pays for its own.
"""

import json
import sys
from functools import partial

from config.load import load
from rpc.errors import CasemateError, InvalidArgument
from shim import absence
from shim.bootstrap import Arguments
from shim.cleanup import TRACES_KEPT, clean_pod
from shim.paths import PodPaths
from shim.persistence import finish


def product_version() -> str:
    from importlib.metadata import PackageNotFoundError, version  # 20 ms, which `delete` does without

    try:
        return version("casemate")
    except PackageNotFoundError:  # a checkout that was never installed
        return "0+checkout"


def print_info() -> None:
    """`-info`: a RuntimeInfo. stdin holds an Any of options; none of ours change the answer."""
    from rpc.api.types import RuntimeInfo, RuntimeVersion
    from shim.features import features

    info = RuntimeInfo(
        name="io.containerd.casemate.v2",
        version=RuntimeVersion(version=product_version()),
        features=features(),
    )
    sys.stdout.buffer.write(info.encode())


def bootstrap_result(arguments: Arguments, address: str, stdin: bytes) -> bytes | None:
    """The answer to BootstrapParams (containerd 2.3), or None if stdin holds the older options.

    Options bytes parse as BootstrapParams too: only one that repeats the flags is taken for it.
    """
    from rpc.api.bootstrap import BootstrapParams, BootstrapResult

    try:
        params = BootstrapParams.decode(stdin)
    except InvalidArgument:
        return None
    if params.instance_id != arguments.id or params.namespace != arguments.namespace:
        return None
    return BootstrapResult(version=3, address=address, protocol="ttrpc").encode()


def delete(arguments: Arguments) -> None:
    """Undoes what a pod left, whether its shim lives or not. A container in another's
    pod owns nothing here."""
    paths = PodPaths(arguments.namespace, arguments.id)
    pid = recorded_pid(paths)
    for line in finish(partial(clean_pod, paths, kept=traces_kept())):
        sys.stderr.write(f"casemate: removed {line}\n")
    sys.stdout.buffer.write(absence.answer(pid))


def traces_kept() -> int:
    """As configured; a configuration that cannot be read must not keep a pod from being removed."""
    try:
        return load().traces_kept
    except CasemateError as error:
        sys.stderr.write(f"casemate: {error}\n")
        return TRACES_KEPT


def recorded_pid(paths: PodPaths) -> int:
    try:
        with open(paths.state) as file:
            containers = json.load(file)["containers"]
        return int(containers[0]["pid"]) if containers else 0
    except (FileNotFoundError, ValueError, KeyError, IndexError, TypeError):
        return 0
