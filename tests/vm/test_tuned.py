"""A guest on its own kernel: booted by QEMU alone, as a pod, and restored; what containers may ask of it.

Building the kernel takes minutes, so these tests are skipped where nobody has: CASEMATE_TEST_KERNEL=tuned
builds it, and runs the other vm tests on it, too (CONTRIBUTING.md).
"""

import json
from pathlib import Path

import pytest

from images import builder, kbuild
from images.image import GuestImage
from images.kernel import KernelKind
from images.store import ImageStore
from images.tuned import kernel as tuned
from tests.vm.conftest import KERNEL_VARIABLE
from tests.vm.pods import CGROUP_MOUNT, Pods

CHECKOUT = Path(__file__).resolve().parents[2]

PROFILE = """\
[profiles.default]
image = "tuned"
"""

# What a container sees of its kernel.
FACTS = """\
import json, os
def lines(name):
    with open(name) as file:
        return file.read().split('\\n')
print(json.dumps({
    'release': os.uname().release, 'version': os.uname().version,
    'namespaces': sorted(os.listdir('/proc/self/ns')),
    'file_systems': [line.split('\\t')[-1] for line in lines('/proc/filesystems') if line],
    'controllers': open('/sys/fs/cgroup/cgroup.controllers').read().split(),
    'modules': lines('/proc/modules')[:-1],
    'devices': sorted(os.listdir('/sys/bus/virtio/drivers')),
    'tables': os.path.exists('/proc/net/ip_tables_names'),
}))
"""


@pytest.fixture(scope="module")
def tuned_image(image_store: Path) -> GuestImage:
    options = builder.Options(name="tuned", kernel=KernelKind.TUNED)
    if not tuned.kept(options.suite):
        pytest.skip(f"no tuned kernel was built from this recipe: {KERNEL_VARIABLE}=tuned builds one")
    store = ImageStore(image_store)
    return builder.current(store, options) or builder.build(store, options).image


@pytest.fixture
def tuned_pods(pods: Pods, tuned_image: GuestImage) -> Pods:
    pods.ctr.instance.configure(PROFILE)
    return pods


def test_a_pod_boots_on_it(tuned_pods: Pods, tuned_image: GuestImage) -> None:
    facts = json.loads(tuned_pods.run("python3", "-c", FACTS, options=CGROUP_MOUNT).ok().out)
    assert facts["release"] == tuned_image.manifest["kernel"]
    (source,) = (
        v for name, v in tuned_image.manifest["kernel_packages"].items() if name.startswith(tuned.SOURCE)
    )
    assert facts["version"].endswith(f"Debian {source}")
    assert facts["modules"] == []
    assert {"9p", "erofs", "ext4", "fuse", "overlay", "tmpfs", "virtiofs"} <= set(facts["file_systems"])
    assert {"cgroup", "ipc", "mnt", "net", "pid", "time", "user", "uts"} <= set(facts["namespaces"])
    assert {"cpu", "cpuset", "hugetlb", "io", "memory", "pids"} <= set(facts["controllers"])
    wanted = {
        "virtio_blk",
        "virtio_console",
        "virtio_net",
        "virtio_balloon",
        "virtio_mem",
        "virtio_rng",
        "virtiofs",
    }
    assert wanted <= set(facts["devices"])
    assert facts["tables"]


def test_its_configuration_is_the_recipes(tuned_pods: Pods) -> None:
    read = "import gzip, sys; sys.stdout.write(gzip.open('/proc/config.gz', 'rt').read())"
    configuration = tuned_pods.run("python3", "-c", read).ok().out
    kbuild.check(tuned.FRAGMENT.read_text(), configuration)


def test_it_mitigates_what_debians_kernel_does(pods: Pods, tuned_image: GuestImage) -> None:
    command = ("sh", "-c", "grep -r . /sys/devices/system/cpu/vulnerabilities | sort")
    debians = pods.run(*command).ok().out
    pods.ctr.instance.configure(PROFILE)
    assert pods.run(*command).ok().out == debians


@pytest.mark.client(
    "ctr run --with-ns network:PATH (ipvlan of mode l2, l3)",
    "works",
    "tried in a VM's kernel, as not every host's has one",
)
@pytest.mark.client(
    "ctr run --with-ns network:PATH (ipvlan of mode l3s)",
    "refused",
    "what comes in passes by the interface, and cannot be redirected",
)
def test_an_ipvlan_is_redirected_unless_its_mode_cannot_be(tuned_pods: Pods) -> None:
    """This machine's own kernel may have none: a guest's is where the redirection is tried."""
    checkout = ("--mount", f"type=bind,src={CHECKOUT},dst=/mnt,options=rbind:ro")
    command = ("python3", "-B", "-m", "tests.vm.ipvlan_guest")
    options = ("--privileged", "--cwd", "/mnt", *checkout)
    said = tuned_pods.run(*command, options=options, timeout_s=120).ok().out
    found = {mode: about for line in said.splitlines() for mode, about in json.loads(line).items()}
    works = {"kinds": ["ipvlan"], "impossible": [], "to": "connected", "from": "connected"}
    assert found["l2"] == works
    assert found["l3"] == works
    assert found["l3s"] == {
        "kinds": [],
        "impossible": ["interface eth0 is an ipvlan of mode l3s"],
        "to": "ConnectionRefusedError",
        "from": "",
    }
