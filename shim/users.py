"""User namespaces that containers ask for: whether their mappings are some, and what the guest is told.

Pure: it must not know how one is made, nor whose it is (sandbox.py).
"""

from rpc.api import agent as api
from rpc.errors import InvalidArgument
from shim.oci import IdMappings, Spec

USER = "user"


def refuse_broken(spec: Spec) -> None:
    """Raises InvalidArgument, as runc does, for a user namespace without mappings, or for mappings alone."""
    mapped = spec.id_mappings
    if spec.namespace(USER) is None:
        if mapped:
            raise InvalidArgument("linux.uidMappings, gidMappings: without a user namespace")
    elif not (mapped.uids and mapped.gids):
        raise InvalidArgument(
            "user namespace: linux.uidMappings and gidMappings do not both say which IDs it has"
        )


def request(mapped: IdMappings) -> api.MakeUsersRequest:
    def ranges(lines: tuple[tuple[int, int, int], ...]) -> list[api.IdRange]:
        return [api.IdRange(inside=inside, outside=outside, size=size) for inside, outside, size in lines]

    return api.MakeUsersRequest(uids=ranges(mapped.uids), gids=ranges(mapped.gids))
