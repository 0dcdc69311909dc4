"""Fixtures of the vm tests: a containerd of each version, the demo image, a census around every test.

A test that uses `ctr` fails if it leaves anything behind. What is tested is in the test files.
"""

import os
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest

from bench.ctr import Ctr
from bench.instance import RUNTIME, Instance
from images import builder, oci
from images.image import GuestImage
from images.kernel import KernelKind
from images.store import ImageStore
from tests.vm import builds, census
from tests.vm.agentvm import AgentVM, make_disk
from tests.vm.cri import Cri, CriInstances
from tests.vm.instances import Instances
from tests.vm.loops import Loop
from tests.vm.pods import FULL, IMAGE, Pods

KERNEL_VARIABLE = "CASEMATE_TEST_KERNEL"
"""Which kernel the guests of the tests have that choose none: a word of `casemate image build --kernel`."""

INSTANCE = pytest.StashKey[Instance]()


@pytest.fixture(scope="session")
def demo_archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo image, from Debian packages that images/oci.py fetches once."""
    archive = tmp_path_factory.mktemp("demo") / "demo.tar"
    oci.write_demo(archive)
    return archive


@pytest.fixture(scope="session")
def image_store() -> Path:
    """A store of the tests' own with the guest image of this checkout, built if it is not there yet."""
    options = builder.Options(kernel=KernelKind(os.environ.get(KERNEL_VARIABLE) or KernelKind.CLOUD))
    store = ImageStore(builds.CACHE.parent / "test-images")
    if builder.current(store, options) is None:
        builder.build(store, options)
        store.gc()
    return store.root


@pytest.fixture(scope="session")
def image(image_store: Path) -> GuestImage:
    """Of the guests."""
    return ImageStore(image_store).resolve("default")


@pytest.fixture(scope="session")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With what the containers of `vm` have for files."""
    return make_disk(tmp_path_factory.mktemp("disk"))


@pytest.fixture(scope="module")
def vm(image: GuestImage, disk: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[AgentVM]:
    """A guest without shim and containerd, whose agent has been greeted."""
    with AgentVM(image, disk, tmp_path_factory.mktemp("vm")) as machine:
        machine.run(machine.begin())
        yield machine


@pytest.fixture(scope="session")
def instances(demo_archive: Path, image_store: Path) -> Iterator[Instances]:
    instances = Instances(demo_archive, image_store)
    yield instances
    instances.close()


@pytest.fixture
def instance(request: pytest.FixtureRequest, instances: Instances) -> Iterator[Instance]:
    """The containerd of this test: FULL, or each version in turn where the test is marked `every_version`."""
    instance = instances.get(getattr(request, "param", FULL))
    request.node.stash[INSTANCE] = instance
    yield instance
    instance.clear_config()


@pytest.fixture
def ctr(instance: Instance, instances: Instances) -> Iterator[Ctr]:
    """`ctr` with a census before and after: whatever the test leaves behind fails it."""
    ctr = Ctr(instance)
    before = census.take(ctr)
    yield ctr
    if not instance.containerd_pid:
        instance.start()
    left = census.left_after(ctr, before)
    if left:
        instances.discard(instance)
        pytest.fail("left behind:\n" + "\n".join(left))


@pytest.fixture(scope="session")
def cri_instances(demo_archive: Path, image_store: Path) -> Iterator[CriInstances]:
    instances = CriInstances(demo_archive, image_store)
    yield instances
    instances.close()


@pytest.fixture
def cri_instance(request: pytest.FixtureRequest, cri_instances: CriInstances) -> Instance:
    return cri_instances.get(getattr(request, "param", FULL))


@pytest.fixture
def cri(cri_instance: Instance, cri_instances: CriInstances) -> Iterator[Cri]:
    """crictl with a census before and after: whatever the test leaves behind fails it."""
    cri = Cri(cri_instance)
    before = census.take(cri.ctr)
    yield cri
    cri_instance.clear_config()
    left = census.left_after(cri.ctr, before)
    if left:
        log = cri_instance.log_tail()
        cri_instances.discard(cri_instance)
        pytest.fail("left behind:\n" + "\n".join(left) + "\n" + log)


@pytest.fixture
def pods(ctr: Ctr) -> Pods:
    return Pods(ctr, os.environ.get("CASEMATE_TEST_RUNTIME", RUNTIME), IMAGE)


@pytest.fixture
def loop(tmp_path: Path) -> Iterator[Loop]:
    loop = Loop(tmp_path / "disk")
    yield loop
    loop.close()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Show the last words of containerd, shims and guests with a failure."""
    report = yield
    instance = item.stash.get(INSTANCE, None)
    if report.failed and instance is not None and instance.base.exists():
        report.sections.append(("containerd's log", instance.log_tail()))
        for name in ("shim.log", "console.log"):
            for path in sorted(instance.path("/run/casemate").glob(f"*/*/{name}"), key=_age)[:2]:
                text = path.read_text(errors="replace")
                report.sections.append((str(path.relative_to(path.parents[3])), text[-4000:]))
    return report


def _age(path: Path) -> float:
    return -path.stat().st_mtime
