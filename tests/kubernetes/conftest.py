"""Fixtures: one cluster for all tests, and a census around each of them."""

import contextlib
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest

from bench.ctr import Ctr
from tests.kubernetes.cluster import CGROUPS, Cluster
from tests.kubernetes.kubectl import Kubectl
from tests.vm import census, cri
from tests.vm.conftest import demo_archive, image_store  # noqa: F401
from tests.vm.pods import FULL, prepare

CLUSTER = pytest.StashKey[Cluster]()
CLEANED_UP_S = 15.0
"""The kubelet takes away a pod's directories and cgroups when it next looks."""


@pytest.fixture(scope="session")
def cluster(
    request: pytest.FixtureRequest,
    demo_archive: Path,  # noqa: F811
    image_store: Path,  # noqa: F811
) -> Iterator[Cluster]:
    with contextlib.ExitStack() as undo:
        instance = cri.start(FULL)
        cluster = Cluster(instance)
        undo.callback(cluster.forget)
        undo.callback(instance.close)
        prepare(instance, demo_archive, image_store)
        Ctr(instance, cri.NAMESPACE).import_image(demo_archive)
        request.session.stash[CLUSTER] = cluster
        cluster.start()
        with cluster.kubectl.pod():  # what is opened once in their lives is open then
            pass
        yield cluster


def remove_sandboxes(crictl: cri.Cri) -> None:
    """Those that have ended: the kubelet collects them once a minute, and may be faster; the census tells."""
    ended = crictl("pods", "--state=notready", "--quiet").ok().out.split()
    if ended:
        crictl("rmp", *ended)


@pytest.fixture
def kubectl(cluster: Cluster) -> Iterator[Kubectl]:
    """With a census before and after: whatever the test leaves behind fails it."""
    ctr = Ctr(cluster.instance, cri.NAMESPACE, CGROUPS)
    before = census.take(ctr)
    yield cluster.kubectl
    remove_sandboxes(cri.Cri(cluster.instance))
    left = census.left_after(ctr, before, CLEANED_UP_S, but=cluster.is_own)
    if left:
        pytest.fail("left behind:\n" + "\n".join(left))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Show the last words of the kubelet and of containerd with a failure."""
    report = yield
    cluster = item.session.stash.get(CLUSTER, None)
    if report.failed and cluster is not None and cluster.home.exists():
        for name, log in (("kubelet", cluster.log("kubelet")), ("containerd", None)):
            report.sections.append((f"{name}'s log", cluster.instance.log_tail(log=log)))
    return report
