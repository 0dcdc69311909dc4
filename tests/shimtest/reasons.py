"""Why a test does not pass: a line for each cause, found by looking into it. It knows names only."""

NO_TRANSFER = (
    "the suite leaves it out: the shim does not serve containerd's transfer service, by which nerdbox's "
    "copies files. What clients have for that (`cp`) goes another way, and works"
)
NO_UDS = (
    "a mount of the type `uds`, which nerdbox's shim knows: a socket whose other end is on the host. What "
    "clients have for that, a bind mount of a socket, is refused by name"
)
NO_NETWORK = (
    "its sandbox is given no network, and is taken to have the host's then. Here it has loopback alone, from "
    "where no name is resolved"
)
OWN_ADDRESS = (
    "a process of the host listens on the address of the sandbox's interface, for a container to connect to. "
    "Here that address is the guest's, and who connects to it from there finds what listens in the guest"
)
REASONS = {
    "TransferCopyTo": NO_TRANSFER,
    "TransferCopyToAndFrom": NO_TRANSFER,
    "TransferExecVerify": NO_TRANSFER,
    "FuzzTransferMissing": NO_TRANSFER,
    "Stress/Transfer": NO_TRANSFER,
    "UDSRoundTrip": NO_UDS,
    "CrossContainerViaUDS": NO_UDS,
    "ContainerOutboundTCP": NO_NETWORK,
    "ContainerTrafficScopedToNetworkSandbox": OWN_ADDRESS,
}
SLOW = {
    "ExecOutputDrainAfterExit": "a program is to have written 8 MiB within 2 s of its start, which emulated "
    "guests miss on a machine that has other things to do",
    "Stress/Exec": "four programs at once are to write up to 32 MiB each within 5 s, and emulated guests "
    "are too slow for that: the first 78 MiB took 6 s from pipe to pipe within one, and 9 s to the client",
}
"""Of emulated guests, which may be fast enough all the same."""


def known(*, emulated: bool) -> dict[str, str]:
    return REASONS | (SLOW if emulated else {})
