"""A pod's network device: how many queues it has and who serves them, and how libvirt is told."""

from __future__ import annotations

from pathlib import Path

import pytest

from shim.vm import designer
from shim.vm.designer import MOST_QUEUES, PORT_BUSES
from shim.vm.domain import Nic
from tests.unit.shim.test_domain import DEFAULT, DOMAINS, SCHEMA, parse, relax_ng_errors

MAC = bytes.fromhex("020000000077")
SERVED = {
    "one queue, by QEMU": (Nic(MAC, "casemate7", 2), {"name": "qemu"}),
    "several, by QEMU": (Nic(MAC, "casemate7", 2, queues=4), {"name": "qemu", "queues": "4"}),
    "several, by the kernel": (
        Nic(MAC, "casemate7", 2, queues=4, vhost=True),
        {"name": "vhost", "queues": "4"},
    ),
}


@pytest.mark.parametrize("name", SERVED)
def test_libvirt_is_told_the_tap_the_port_and_who_serves_its_queues(name: str) -> None:
    nic, driver = SERVED[name]
    tree = parse(nic.xml())
    assert (tree.tag, tree.attrib) == ("interface", {"type": "ethernet"})
    found = {child.tag: child.attrib for child in tree}
    assert found["driver"] == driver
    assert found["mac"] == {"address": "02:00:00:00:00:77"}
    assert found["target"] == {"dev": "casemate7"}
    assert found["model"] == {"type": "virtio"}
    assert found["rom"] == {"enabled": "no"}
    assert (found["address"]["bus"], found["address"]["slot"]) == ("2", "0")


@pytest.mark.parametrize("name", SERVED)
def test_a_machine_that_has_it_is_valid_by_libvirts_schema(name: str) -> None:
    if not SCHEMA.exists():
        pytest.skip("libvirt's schemas are not installed (Debian: libvirt0)")
    machine = DOMAINS["kvm-vsock"].xml()
    having = machine.replace("</devices>", SERVED[name][0].xml() + "</devices>")
    assert having != machine
    assert relax_ng_errors(having, SCHEMA) == []


@pytest.mark.parametrize(
    ("vcpus", "queues"), [(1, 1), (2, 2), (MOST_QUEUES, MOST_QUEUES), (MOST_QUEUES + 1, MOST_QUEUES)]
)
def test_each_cpu_of_the_guest_has_a_queue_up_to_the_most(vcpus: int, queues: int) -> None:
    nic = designer.nic(MAC, "casemate7", PORT_BUSES[0], DEFAULT.replace(vcpus=vcpus))
    assert (nic.mac, nic.tap, nic.bus, nic.queues) == (MAC, "casemate7", PORT_BUSES[0], queues)


def test_the_hosts_kernel_serves_them_where_it_can(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    device = tmp_path / "vhost-net"
    monkeypatch.setattr(designer, "VHOST_NET_DEVICE", str(device))
    assert designer.nic(MAC, "casemate7", 2, DEFAULT).vhost is False
    device.touch()
    assert designer.nic(MAC, "casemate7", 2, DEFAULT).vhost is True
