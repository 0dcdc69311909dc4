"""Drivers of devices that a guest may be given: each loads in a guest that has none of them."""

import pytest

from agent.boot import MODULE_LIST
from images.modules import DRIVERS
from tests.vm import agentvm
from tests.vm.agentvm import AgentVM

# As the agent does: what the image lists for the feature, in its order. What is loaded already is (EEXIST).
LOAD = f"""\
sed -n "s/^$1://p" /guest{MODULE_LIST} | tr ' ' '\\n' | grep . > /tmp/list || echo none
while read -r path; do
    /guest/usr/bin/busybox insmod /guest$path 2>&1 | grep -v 'File exists'
done < /tmp/list
cat /proc/misc
ls /guest/sys/module
"""
RDMA = "mlx5-rdma"


@pytest.mark.parametrize("feature", [*DRIVERS, RDMA])
def test_the_driver_loads(vm: AgentVM, feature: str) -> None:
    what = agentvm.privileged("sh", "-c", LOAD, "load", feature)
    status, out, err = vm.run(vm.once(f"load-{feature}", what))
    assert status == 0, (out, err)
    lines = out.decode().splitlines()
    assert "insmod" not in out.decode(), lines
    if lines[0] != "none":
        assert {"mlx5-rdma": "mlx5_ib", "mlx5": "mlx5_core"}.get(feature, feature) in lines
    if feature == RDMA:
        assert any(line.split()[1:] == ["rdma_cm"] for line in lines), lines  # of /proc/misc
