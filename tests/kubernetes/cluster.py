"""A Kubernetes of one node: etcd, the API server and a kubelet, in the namespaces of a containerd.

No scheduler and no controller manager: a test's pod names its node. Who may do what is not its business
either: everybody who has the token may do everything.
"""

import contextlib
import json
import os
import secrets
import signal
import subprocess
from pathlib import Path
from typing import Any

from bench.instance import CHECKOUT, Instance
from tests.kubernetes.kubectl import Kubectl
from tests.vm import builds
from tests.vm.cri import HANDLER, hierarchies

NODE = "casemate-node"
ADDRESS = "10.89.0.1"
"""The node's, which may not be a loopback address: it is one more of lo."""
API = f"https://{ADDRESS}:6443"
KUBELET_PORT = 10250
ETCD = "http://127.0.0.1:2379"
CGROUPS = f"kubernetes-{os.getpid()}"
"""Of this process alone, as there may be other tests on this machine."""
RUNTIME_CLASS = CHECKOUT / "config/kubernetes/runtimeclass.yaml"
DAEMON_S = 120.0
POD_PIDS = 400
GATES = {"ImageVolume": True}
"""Features that 1.34 has and does not yet have by itself."""
STATE = Path("/var/lib/kubelet")
"""Not configurable as a whole (the device plug-ins' sockets): the node's own directory is mounted there. It
stays, empty: who removed it would take away the mount of another run that there may be.
"""
LOGS = Path("/var/log")
TUNED = {"kernel/panic": "10", "kernel/panic_on_oops": "1", "vm/overcommit_memory": "1"}
"""What a kubelet makes of the kernel it runs on. It finds files that say so: the host's stay as they are."""


def kubelet_configuration(home: Path) -> dict[str, Any]:
    """A KubeletConfiguration (kubelet.config.k8s.io/v1beta1) for a machine that may be rather full."""
    return {
        "apiVersion": "kubelet.config.k8s.io/v1beta1",
        "kind": "KubeletConfiguration",
        "containerRuntimeEndpoint": "unix:///run/containerd/containerd.sock",
        "authentication": {"anonymous": {"enabled": True}, "webhook": {"enabled": False}},
        "authorization": {"mode": "AlwaysAllow"},
        "cgroupDriver": "cgroupfs",
        "cgroupRoot": f"/{CGROUPS}",
        "failCgroupV1": False,
        "failSwapOn": False,
        "makeIPTablesUtilChains": False,
        "oomScoreAdj": int(Path("/proc/self/oom_score_adj").read_text()),
        "podPidsLimit": POD_PIDS,
        "allowedUnsafeSysctls": ["net.core.somaxconn"],
        "syncFrequency": "2s",  # when it looks whether a ConfigMap of a running pod is another now
        "imageGCHighThresholdPercent": 100,
        "evictionHard": {"memory.available": "64Mi", "nodefs.available": "1%", "imagefs.available": "1%"},
        "resolvConf": str(home / "resolv.conf"),
        "clusterDNS": ["192.0.2.53"],
        "clusterDomain": "cluster.example",
        "volumePluginDir": str(home / "plugins"),
        "featureGates": GATES,
    }


class Cluster:
    """instance: a containerd with CRI and a network for pods."""

    def __init__(self, instance: Instance) -> None:
        self.instance = instance
        self.home = instance.base / "kubernetes"
        self.programs = builds.kubernetes()
        self.token = secrets.token_hex(16)
        self.kubectl = Kubectl(instance, self.programs / "kubectl", self._kubeconfig)
        self.kubelet_pid = 0

    @property
    def _kubeconfig(self) -> Path:
        return self.home / "kubeconfig"

    def start(self) -> None:
        """Returns when the node is ready. Raises InstanceError with the last words of who did not start."""
        self._write_files()
        self.on_node("ip", "address", "add", f"{ADDRESS}/32", "dev", "lo")
        for path, directory in ((STATE, "state"), (LOGS, "logs")):
            self.on_node("mount", "--bind", str(self.home / directory), str(path))
        for name in TUNED:
            self.on_node("mount", "--bind", str(self.home / "kernel" / name), f"/proc/sys/{name}")
        for top in hierarchies():
            (top / CGROUPS).mkdir()
        self._start_etcd()
        self._start_api_server()
        self.start_kubelet()
        self.kubectl.wait_for("node", NODE, "create")
        self.kubectl.wait_for("node", NODE, "condition=Ready")
        runtime_class = RUNTIME_CLASS.read_text().replace("handler: casemate", f"handler: {HANDLER}")
        self.kubectl("create", "-f", "-", stdin=runtime_class.encode()).ok()

    def forget(self) -> None:
        """What the end of the instance leaves, with which processes and mounts end."""
        for top in hierarchies():
            for directory, _, _ in os.walk(top / CGROUPS, topdown=False):
                with contextlib.suppress(FileNotFoundError):
                    os.rmdir(directory)

    def start_kubelet(self) -> None:
        argv = [
            str(self.programs / "kubelet"),
            f"--config={self.home}/kubelet.json",
            f"--kubeconfig={self._kubeconfig}",
            f"--hostname-override={NODE}",
            f"--node-ip={ADDRESS}",
            "--node-labels=casemate.dev/runtime=true",
        ]
        self.kubelet_pid = self.instance.spawn_ready(argv, DAEMON_S, log=self.log("kubelet"))

    def stop_kubelet(self) -> None:
        os.kill(self.kubelet_pid, signal.SIGTERM)
        self.instance.wait_exit(self.kubelet_pid, DAEMON_S)

    def is_own(self, left: str) -> bool:
        """Whether a line of a census is the kubelet's or containerd's own, with any runtime: a kubelet that
        was started anew, cgroups of classes of pods, connections, a directory for image volumes.
        """
        kind, _, name = left.partition(": ")
        return (
            (kind == "processes" and name.startswith(f"{self.kubelet_pid} "))
            or (kind == "cgroups" and "/pod" not in name)
            or (kind == "files" and name.endswith("/image-volumes"))
            or (kind == "open_files" and name.startswith("socket:"))
        )

    def log(self, daemon: str) -> Path:
        return self.home / f"{daemon}.log"

    def of_kubelet(self, path: str) -> str:
        """What the kubelet's own server answers, by way of the API server."""
        return self.kubectl("get", "--raw", f"/api/v1/nodes/{NODE}/proxy{path}").ok().out

    def _start_etcd(self) -> None:
        argv = [
            str(self.programs / "server"),
            f"--data-dir={self.home}/etcd",
            f"--listen-client-urls={ETCD}",
            f"--advertise-client-urls={ETCD}",
            "--listen-peer-urls=http://127.0.0.1:2380",
            "--unsafe-no-fsync",
        ]
        self.instance.spawn(argv, log=self.log("etcd"))  # the API server waits until it answers

    def _start_api_server(self) -> None:
        key = self.home / "account.key"
        self.on_node("openssl", "genrsa", "-out", str(key), "2048")
        argv = [
            str(self.programs / "kube-apiserver"),
            f"--etcd-servers={ETCD}",
            f"--bind-address={ADDRESS}",
            f"--advertise-address={ADDRESS}",
            "--endpoint-reconciler-type=none",
            f"--cert-dir={self.home}/certificates",
            "--service-cluster-ip-range=10.96.0.0/16",
            f"--token-auth-file={self.home}/tokens.csv",
            "--authorization-mode=AlwaysAllow",
            "--disable-admission-plugins=ServiceAccount",
            "--service-account-issuer=https://kubernetes.default",
            f"--service-account-key-file={key}",
            f"--service-account-signing-key-file={key}",
            "--kubelet-preferred-address-types=InternalIP",
            "--allow-privileged=true",
            f"--feature-gates={','.join(f'{name}={on}' for name, on in GATES.items())}",
        ]
        self.instance.spawn_ready(argv, DAEMON_S, log=self.log("kube-apiserver"))

    def _write_files(self) -> None:
        for name in ("state", "logs", "plugins"):
            (self.home / name).mkdir(parents=True)
        for name, value in TUNED.items():
            path = self.home / "kernel" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"{value}\n")
        STATE.mkdir(exist_ok=True)
        (self.home / "resolv.conf").write_text("nameserver 192.0.2.53\n")
        (self.home / "tokens.csv").write_text(f"{self.token},tests,tests,system:masters\n")
        (self.home / "kubelet.json").write_text(json.dumps(kubelet_configuration(self.home)))
        config = {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": "one", "cluster": {"server": API, "insecure-skip-tls-verify": True}}],
            "users": [{"name": "tests", "user": {"token": self.token}}],
            "contexts": [{"name": "it", "context": {"cluster": "one", "user": "tests"}}],
            "current-context": "it",
        }
        self._kubeconfig.write_text(json.dumps(config))

    def on_node(self, *argv: str) -> None:
        """A command that goes well, in the node's namespaces."""
        subprocess.run(self.instance.inside(*argv), check=True, capture_output=True)
