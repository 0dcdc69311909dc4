"""Containers of a Docker Engine that gives each a user namespace (`userns-remap`)."""

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.vm import census, dockerd
from tests.vm.conftest import INSTANCE
from tests.vm.dockerd import Docker
from tests.vm.dockerlike import IMAGE
from tests.vm.instances import Instances

FIRST, SIZE = 100000, 65536
USERS = ("nobody", "nogroup")
"""Who has them, user and group, as these files of /etc say in the mount namespace of the daemon."""
FILES = ("subuid", "subgid")


@pytest.fixture(scope="module")
def engine(instances: Instances, demo_archive: Path) -> Iterator[Docker]:
    instance = instances.get(dockerd.CONTAINERD)
    for name in FILES:
        ranges = instance.work / name
        ranges.write_text("".join(f"{each}:{FIRST}:{SIZE}\n" for each in USERS))
        subprocess.run(instance.inside("mount", "--bind", str(ranges), f"/etc/{name}"), check=True)
    docker = Docker(instance)
    try:
        docker.serve(f"--userns-remap={':'.join(USERS)}")
        docker("load", "--quiet", "--input", str(demo_archive)).ok()
        docker.run(IMAGE, "true").ok()
        yield docker
    finally:
        docker.stop()
        dockerd.forget_cgroups()
        for name in FILES:
            subprocess.run(instance.inside("umount", f"/etc/{name}"), check=True)


@pytest.fixture
def docker(request: pytest.FixtureRequest, engine: Docker) -> Iterator[Docker]:
    """The engine with a census before and after: whatever the test leaves behind fails it."""
    request.node.stash[INSTANCE] = engine.instance
    before = census.take(engine.ctr)
    yield engine
    if left := census.left_after(engine.ctr, before, but=engine.is_own):
        pytest.fail("left behind:\n" + "\n".join(left))


@pytest.mark.client("dockerd --userns-remap: docker run, exec, --volume", "works", "root is nobody in the VM")
@pytest.mark.client(
    "dockerd --userns-remap: docker run --network container:X", "works", "in X's user namespace"
)
@pytest.mark.client("dockerd --userns-remap: docker run --userns host", "works", "as without")
def test_ids_of_dockers_containers_are_others_outside(docker: Docker) -> None:
    """A network of its own, which a hook of Docker's makes, belongs to the user namespace as under runc."""
    directory = docker.instance.work / "remapped"
    directory.mkdir()
    directory.chmod(0o777)
    options = ("--volume", f"{directory}:/volume", "--cap-add", "NET_ADMIN")
    with docker.detached("sleep", "1000", options=options) as name:
        script = "id -u; cat /proc/self/uid_map; touch /volume/made; stat -c %u /etc/hosts /etc/passwd"
        assert docker.exec(name, "sh", "-c", script).split() == ["0", "0", str(FIRST), str(SIZE), "0", "0"]
        assert (directory / "made").stat().st_uid == FIRST
        address = docker.inspect(name)["NetworkSettings"]["Networks"]["bridge"]["IPAddress"]
        changed = (
            "ip -4 -o address show dev eth0; ip address add 10.9.8.7/32 dev lo; readlink /proc/self/ns/user"
        )
        *shown, users = docker.exec(name, "sh", "-c", changed).split()
        assert any(word.startswith(f"{address}/") for word in shown)
        joined = docker.run(
            "--network", f"container:{name}", IMAGE, "sh", "-c", changed.replace(".7/", ".6/")
        )
        assert "Operation not permitted" in joined.err  # without that capability
        assert joined.out.split()[-1] == users
    hosts = docker.run("--userns", "host", IMAGE, "sh", "-c", "cat /proc/self/uid_map").ok().out
    assert hosts.split() == ["0", "0", "4294967295"]
