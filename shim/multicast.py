"""Interfaces that take in every multicast frame, as it is not their own namespace that listens (packet(7)).

The kernel takes it back with the socket, however its process ends. It must not know what a guest is.
"""

import socket
import struct

# linux/socket.h, linux/if_packet.h
_SOL_PACKET, _ADD_MEMBERSHIP, _DROP_MEMBERSHIP, _ALL_MULTICAST = 263, 1, 2, 2
_MEMBERSHIP = struct.Struct("=iHH8x")  # interface, type, length of the address that this type has not


class EveryGroup:
    """Of the namespace that the calling thread is in when it is made. Raises OSError, as all of it."""

    def __init__(self) -> None:
        # Of protocol 0: it gets no packet itself.
        self._socket = socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC, 0)

    def join(self, index: int) -> None:
        self._ask(_ADD_MEMBERSHIP, index)

    def leave(self, index: int) -> None:
        """Of one that is there no more, too (af_packet.c: it left as it went)."""
        self._ask(_DROP_MEMBERSHIP, index)

    def close(self) -> None:
        self._socket.close()

    def _ask(self, what: int, index: int) -> None:
        self._socket.setsockopt(_SOL_PACKET, what, _MEMBERSHIP.pack(index, _ALL_MULTICAST, 0))
