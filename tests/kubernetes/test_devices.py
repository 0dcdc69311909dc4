"""What a device plugin's devices come to. This machine has none of VFIO's: that shows in the errors."""

import contextlib
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from bench.instance import CHECKOUT
from tests.kubernetes import plugin
from tests.kubernetes.cluster import NODE, STATE, Cluster
from tests.kubernetes.kubectl import FOREVER, Kubectl, container
from tests.vm.operator import casemate

GPU, FUSE = "casemate.example/pgpu", "casemate.example/fuse"
DEV = Path("/dev/vfio")
GROUP = 7


@pytest.fixture
def node(cluster: Cluster, kubectl: Kubectl) -> Iterator[Cluster]:
    """One with a device plugin of two resources. The one's device has a name of CDI, which is a node in
    /dev/vfio; the host has a file there, and no such device."""
    instance = cluster.instance
    cdi = instance.config_dir / "cdi"
    with contextlib.ExitStack() as undo:
        instance.configure(f'[vfio]\ncdi_dir = "{cdi}"\n')
        undo.callback(instance.clear_config)
        cdi.mkdir()
        undo.callback(shutil.rmtree, cdi)
        edits = {"deviceNodes": [{"path": f"{DEV}/{GROUP}"}]}
        spec = {"cdiVersion": "0.5.0", "kind": GPU, "devices": [{"name": "gpu-a", "containerEdits": edits}]}
        (cdi / "plugin.json").write_text(json.dumps(spec))
        if not DEV.exists():  # an empty one means nothing to anybody
            DEV.mkdir()
            undo.callback(DEV.rmdir)
        cluster.on_node("mount", "-t", "tmpfs", "none", str(DEV))
        undo.callback(cluster.on_node, "umount", str(DEV))
        cluster.on_node("touch", f"{DEV}/{GROUP}")
        words = (f"{STATE}/device-plugins", f"{GPU}=gpu-a", f"{FUSE}=0,1")
        program = ("env", f"PYTHONPATH={CHECKOUT}", sys.executable, plugin.__file__, *words)
        process = undo.enter_context(
            subprocess.Popen(instance.inside(*program), stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        )
        undo.callback(process.communicate)
        assert process.stdout is not None
        assert process.stdout.readline() == b"\n"
        for resource, count in {GPU: 1, FUSE: 2}.items():
            name = resource.replace(".", "\\.")
            kubectl.wait_for("node", NODE, f"jsonpath={{.status.allocatable.{name}}}={count}")
        yield cluster


@pytest.mark.client(
    "kubectl create (resources.limits of a device plugin)",
    "works",
    "VFIO's are the VM's from its start on; shown here with one that the host does not have",
)
def test_the_kubelet_is_asked_which_devices_the_pod_has(kubectl: Kubectl, node: Cluster) -> None:
    wanting = container(*FOREVER, name="wanting", resources={"limits": {GPU: "1"}})
    with kubectl.asked(container(*FOREVER), wanting) as pod:
        words = (
            f"device {GPU} gpu-a, which the kubelet has for container 'wanting': "
            f"{DEV}/{GROUP}: the host has no such device any more"
        )
        assert "FailedCreatePodSandBox" in pod.wait_event(words)


@pytest.mark.client(
    "kubectl create (resources.limits of a device plugin whose devices are not VFIO's)",
    "works",
    "what the plugin gives the container; not the device, which the pod's log says",
)
def test_what_is_no_device_of_vfios_is_a_line_in_the_log(kubectl: Kubectl, node: Cluster) -> None:
    wanting = container(*FOREVER, resources={"limits": {FUSE: "2"}})
    with kubectl.pod(wanting) as pod:
        assert sorted(pod.sh(f"echo ${plugin.VARIABLE}").split()) == ["0", "1"]
        listed = json.loads(casemate(node.instance, "ps", "--json").stdout)
        (found,) = [
            each["id"] for each in listed if any(one["state"] == "running" for one in each["containers"])
        ]
        log = casemate(node.instance, "logs", "--shim", found).stdout
        assert f"{FUSE} of container main (" in log
        assert "is not the machine's to have" in log


def test_a_pod_without_any_is_as_ever(kubectl: Kubectl, node: Cluster) -> None:
    with kubectl.pod() as pod:
        assert pod.exec("ls", str(DEV)).code != 0
