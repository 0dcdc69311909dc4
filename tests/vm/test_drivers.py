"""Drivers that make more of a device than a driver of the kernel's does by itself."""

from agent.boot import MODULE_LIST
from agent.passthrough import RDMA
from tests.vm import agentvm
from tests.vm.agentvm import AgentVM

# As the agent does: what the image lists for the feature, in its order. Some is there already (EEXIST).
LOAD = f"""\
sed -n "s/^$1://p" /guest{MODULE_LIST} | tr ' ' '\\n' | grep . > /tmp/list || echo none
while read -r path; do
    /guest/usr/bin/busybox insmod /guest$path 2>&1 | grep -v 'File exists'
done < /tmp/list
cat /proc/misc
"""


def test_with_the_drivers_of_rdma_comes_its_node_for_connections(vm: AgentVM) -> None:
    """Without a card, too; that they are there with one, no test can show (docs/gpus.md)."""
    (feature,) = RDMA.values()
    status, out, err = vm.run(vm.once("rdma", agentvm.privileged("sh", "-c", LOAD, "load", feature)))
    assert status == 0, (out, err)
    lines = out.decode().splitlines()
    assert lines[0] == "none" or any(line.split()[1:] == ["rdma_cm"] for line in lines), lines
    assert not [line for line in lines if "insmod" in line]
