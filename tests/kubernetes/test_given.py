"""What a pod is given: volumes of every kind, and what is told to it of itself."""

import base64
import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.kubernetes.cluster import NODE, Cluster
from tests.kubernetes.kubectl import FOREVER, IMAGE, Kubectl, container

MIB = 1 << 20


def mounted(name: str, path: str, **more: Any) -> dict[str, Any]:
    return {"name": name, "mountPath": path, **more}


def named(kind: str, name: str, **fields: Any) -> dict[str, Any]:
    return {"apiVersion": "v1", "kind": kind, "metadata": {"name": name}, **fields}


@pytest.fixture
def settings(kubectl: Kubectl) -> Iterator[None]:
    """A ConfigMap and a Secret of that name."""
    secret = {"password": base64.b64encode(b"first").decode()}
    with (
        kubectl.created(named("ConfigMap", "settings", data={"colour": "red\n", "shape": "round\n"})),
        kubectl.created(named("Secret", "settings", data=secret)),
    ):
        yield


@pytest.mark.client(
    "kubectl create (volumes of a ConfigMap, a Secret, the downward API, projected)",
    "works",
    "changed while the pod runs",
)
@pytest.mark.usefixtures("settings")
def test_configuration_that_is_changed_is_seen_by_the_running_pod(kubectl: Kubectl) -> None:
    labels = {"path": "labels", "fieldRef": {"fieldPath": "metadata.labels"}}
    volumes: list[dict[str, Any]] = [
        {"name": "config", "configMap": {"name": "settings"}},
        {"name": "secret", "secret": {"secretName": "settings", "defaultMode": 0o400}},
        {"name": "about", "downwardAPI": {"items": [labels]}},
        {
            "name": "all",
            "projected": {
                "sources": [
                    {"configMap": {"name": "settings", "items": [{"key": "shape", "path": "in/shape"}]}},
                    {"secret": {"name": "settings"}},
                ]
            },
        },
    ]
    mounts = [mounted(volume["name"], f"/{volume['name']}") for volume in volumes]
    mounts.append(mounted("config", "/alone/colour", subPath="colour"))
    with kubectl.pod(container(*FOREVER, volumeMounts=mounts), volumes=volumes) as pod:
        seen = "cat /config/colour /config/shape /secret/password /all/in/shape /all/password /alone/colour"
        assert pod.sh(seen) == "red\nround\nfirstround\nfirstred\n"
        assert pod.sh("stat -Lc %a /secret/password") == "400\n"
        assert f'app="{pod.name}"' in pod.sh("cat /about/labels")
        assert "Read-only file system" in pod.exec("touch", "/config/new").err
        kubectl("patch", "configmap", "settings", "--patch", '{"data":{"colour":"blue\\n"}}').ok()
        kubectl("patch", "secret", "settings", "--patch", '{"stringData":{"password":"second"}}').ok()
        kubectl("label", "pod", pod.name, "season=autumn").ok()
        changed = "cat /config/colour /secret/password /all/password; grep -c autumn /about/labels"
        kubectl.wait(lambda: pod.exec("sh", "-c", changed).out == "blue\nsecondsecond1\n", "it is changed")
        assert pod.sh("cat /alone/colour") == "red\n"  # as ever: a subPath is what it was at the start


@pytest.mark.client(
    "kubectl create (emptyDir, its sizeLimit with medium: Memory)", "works", "shared by the pod's containers"
)
def test_empty_directories(kubectl: Kubectl) -> None:
    volumes = [
        {"name": "disk", "emptyDir": {}},
        {"name": "memory", "emptyDir": {"medium": "Memory", "sizeLimit": "16Mi"}},
    ]
    mounts = [mounted("disk", "/disk"), mounted("memory", "/memory")]
    part = [mounted("disk", "/part", subPath="below"), mounted("memory", "/memory", readOnly=True)]
    with kubectl.pod(
        container(*FOREVER, volumeMounts=mounts),
        container(*FOREVER, name="other", volumeMounts=part),
        volumes=volumes,
    ) as pod:
        pod.sh("echo one >/disk/below/file; echo two >/memory/file; stat -c %a /disk")
        assert pod.sh("cat /part/file /memory/file", container="other") == "one\ntwo\n"
        assert "Read-only file system" in pod.exec("touch", "/memory/new", container="other").err
        size = int(pod.sh("df -B1 --output=size /memory | tail -1"))
        assert size == 16 * MIB
        full = pod.exec("sh", "-c", "head -c 20000000 /dev/zero >/memory/large")
        assert "No space left on device" in full.err


@pytest.mark.client(
    "kubectl create (env of fieldRef, resourceFieldRef, hostAliases, dnsConfig, hostname)", "works", ""
)
def test_a_pod_is_told_of_itself(kubectl: Kubectl) -> None:
    def field(path: str) -> dict[str, Any]:
        return {"valueFrom": {"fieldRef": {"fieldPath": path}}}

    environment = [
        {"name": "ADDRESS", **field("status.podIP")},
        {"name": "NODE", **field("spec.nodeName")},
        {"name": "CPUS", "valueFrom": {"resourceFieldRef": {"resource": "limits.cpu"}}},
    ]
    with kubectl.pod(
        container(*FOREVER, env=environment, resources={"limits": {"cpu": "1"}}),
        hostname="keep",
        hostAliases=[{"ip": "192.0.2.1", "hostnames": ["tower.example"]}],
        dnsConfig={"searches": ["tests.example"]},
    ) as pod:
        said = pod.sh("echo $ADDRESS $NODE $CPUS; hostname; getent hosts tower.example").split()
        assert said == [pod.status["podIP"], NODE, "1", "keep", "192.0.2.1", "tower.example"]
        resolving = pod.sh("cat /etc/resolv.conf")
        assert "nameserver 192.0.2.53" in resolving
        assert "tests.example" in resolving


@pytest.mark.client("kubectl create (hostPath (DirectoryOrCreate, File))", "works", "by virtio-fs")
def test_paths_of_the_host(kubectl: Kubectl, cluster: Cluster) -> None:
    directory = cluster.instance.work / "host"
    directory.mkdir()
    (directory / "file").write_text("the host's\n")
    volumes = [
        {"name": "made", "hostPath": {"path": f"{directory}/made", "type": "DirectoryOrCreate"}},
        {"name": "file", "hostPath": {"path": f"{directory}/file", "type": "File"}},
    ]
    mounts = [mounted("made", "/made"), mounted("file", "/file")]
    with kubectl.pod(container(*FOREVER, volumeMounts=mounts), volumes=volumes) as pod:
        pod.sh("cp /file /made/copy; echo more >>/file")
    assert (directory / "made/copy").read_text() == "the host's\n"
    assert (directory / "file").read_text() == "the host's\nmore\n"


@pytest.mark.client(
    "kubectl create (volumeMounts: recursiveReadOnly)", "works", "so is any volume of readOnly"
)
def test_what_is_mounted_below_a_read_only_volume_is_so(kubectl: Kubectl, cluster: Cluster) -> None:
    directory = cluster.instance.work / "upper"
    (directory / "lower").mkdir(parents=True)
    cluster.on_node("mount", "-t", "tmpfs", "tmpfs", f"{directory}/lower")
    volumes = [{"name": "host", "hostPath": {"path": str(directory)}}]
    mounts = [
        mounted("host", "/all", readOnly=True, recursiveReadOnly="Enabled"),
        mounted("host", "/plain", readOnly=True),
        mounted("host", "/writable"),
    ]
    with kubectl.pod(container(*FOREVER, volumeMounts=mounts), volumes=volumes) as pod:
        pod.sh("touch /writable/lower/new")
        for place in ("all", "plain"):
            assert "Read-only file system" in pod.exec("touch", f"/{place}/lower/new").err
    cluster.on_node("umount", f"{directory}/lower")


@pytest.fixture
def raw_volume(kubectl: Kubectl, tmp_path: Path) -> Iterator[Path]:
    """The file behind a volume `raw` that is a block device of the node's, and a claim that is bound to it.

    Binding them is the controller manager's part, which there is none of here.
    """
    backing = tmp_path / "disk"
    with backing.open("wb") as file:
        file.truncate(16 * MIB)
    loop = subprocess.run(
        ["losetup", "--find", "--show", backing], check=True, capture_output=True, text=True
    ).stdout.strip()
    modes = {"accessModes": ["ReadWriteOnce"]}
    common = {"volumeMode": "Block", "storageClassName": "", **modes}
    size = {"storage": "16Mi"}
    here = {"key": "kubernetes.io/hostname", "operator": "In", "values": [NODE]}
    claim = named(
        "PersistentVolumeClaim", "raw", spec={**common, "volumeName": "raw", "resources": {"requests": size}}
    )
    volume = named(
        "PersistentVolume",
        "raw",
        spec={
            **common,
            "capacity": size,
            "local": {"path": loop},
            "nodeAffinity": {"required": {"nodeSelectorTerms": [{"matchExpressions": [here]}]}},
        },
    )
    bound: dict[str, dict[str, Any]] = {
        "pv": {"phase": "Bound"},
        "pvc": {"phase": "Bound", "capacity": size, **modes},
    }
    try:
        kubectl.create(claim).ok()
        about = kubectl.json("get", "pvc", "raw")["metadata"]
        volume["spec"]["claimRef"] = {name: about[name] for name in ("namespace", "name", "uid")}
        kubectl.create(volume).ok()
        for kind, status in bound.items():
            change = json.dumps({"status": status})
            kubectl("patch", kind, "raw", "--subresource=status", "--patch", change).ok()
        yield backing
    finally:
        for kind in ("pvc", "pv"):  # that nobody uses them is the controller manager's to find, too
            kubectl("delete", kind, "raw", "--wait=false", "--ignore-not-found")
            kubectl("patch", kind, "raw", "--patch", json.dumps({"metadata": {"finalizers": None}}))
        subprocess.run(["losetup", "--detach", loop], check=True)


@pytest.mark.client(
    "kubectl create (volumeDevices, a volume of volumeMode: Block)", "works", "a disk of the VM"
)
def test_a_raw_block_volume(kubectl: Kubectl, raw_volume: Path) -> None:
    volumes = [{"name": "raw", "persistentVolumeClaim": {"claimName": "raw"}}]
    devices = [{"name": "raw", "devicePath": "/dev/raw"}]
    with kubectl.pod(container(*FOREVER, volumeDevices=devices), volumes=volumes) as pod:
        assert pod.sh("stat -c %F /dev/raw") == "block special file\n"
        pod.sh("printf written >/dev/raw && sync /dev/raw")
    assert raw_volume.read_bytes()[:8] == b"written\0"


@pytest.mark.client("kubectl create (volumes: image)", "works", "")
def test_an_image_as_a_volume(kubectl: Kubectl) -> None:
    volumes = [{"name": "image", "image": {"reference": IMAGE, "pullPolicy": "Never"}}]
    mounts = [mounted("image", "/image")]
    with kubectl.pod(container(*FOREVER, volumeMounts=mounts), volumes=volumes) as pod:
        assert pod.sh("cat /image/etc/os-release") == pod.sh("cat /etc/os-release")
        assert "Read-only file system" in pod.exec("touch", "/image/new").err
