"""CPUs on a real kernel, in a machine that plays the host (hostscan.py): two NUMA nodes, and a CPU that the
scheduler leaves alone (isolcpus), which an operator keeps for dedicated pods."""

import pytest

from images.builder import KERNEL_PACKAGES, PACKAGES
from images.kernel import KernelKind, find_kernel
from images.packages import Request, fetch
from tests.vm import hostscan
from tests.vm.hostcpus import Seen
from vfio.ledger.demand import HostNode


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> Seen:
    kernel = find_kernel(fetch(Request((*PACKAGES, *KERNEL_PACKAGES[KernelKind.CLOUD]))).path)
    directory = tmp_path_factory.mktemp("cpus")
    seen = hostscan.boot(kernel.image, directory, [], "isolcpus=1 nohz_full=1", "hostcpus")
    assert isinstance(seen, Seen)
    return seen


def test_each_node_has_its_cores(seen: Seen) -> None:
    assert [HostNode(node.node, node.cores) for node in seen.nodes] == [
        HostNode(0, ((0,),)),
        HostNode(1, ((1,),)),
    ]


def test_a_pod_may_have_what_its_cpuset_has_though_nothing_else_runs_there(seen: Seen) -> None:
    assert seen.begun == {0}
    assert (seen.bare, seen.top, seen.below) == ([0], [0, 1], [1])


def test_each_cpu_is_claimed_once_and_runs_what_is_pinned_to_it(seen: Seen) -> None:
    assert seen.claimed == [(0,), (1,)]
    assert seen.ran == [0, 1]
    assert "not free: 1 CPUs of 2 NUMA nodes (1 wanted, 0 free)" in seen.refused
    assert "CPUs 1 of NUMA node 1 are claimed, pod test/second" in seen.refused
