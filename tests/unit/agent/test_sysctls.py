"""The network's kernel parameters, on a tree of files as /proc/sys is one."""

from pathlib import Path
from typing import Any

import pytest

from agent.sysctls import all_set, take_network
from rpc.errors import FailedPrecondition, InvalidArgument


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "net/ipv4/conf/eth0.5").mkdir(parents=True)
    (tmp_path / "net/core").mkdir()
    (tmp_path / "net/ipv4/ping_group_range").write_text("1\t0\n")
    (tmp_path / "net/ipv4/conf/eth0.5/forwarding").write_text("0\n")
    (tmp_path / "net/core/somaxconn").write_text("4096\n")
    return tmp_path


def set_for_good(wanted: dict[str, str], root: str | None, *, shared: bool = False) -> None:
    with all_set(wanted, root, shared=shared):
        pass


def test_only_the_networks_are_taken() -> None:
    spec: dict[str, Any] = {
        "linux": {
            "sysctl": {"net.core.somaxconn": "1", "net/ipv4/x": "2", "kernel.msgmax": "3", "network": "4"}
        }
    }
    assert take_network(spec) == {"net.core.somaxconn": "1", "net/ipv4/x": "2"}
    assert spec["linux"]["sysctl"] == {"kernel.msgmax": "3", "network": "4"}


def test_with_a_network_of_its_own_a_container_has_its_own() -> None:
    linux = {"sysctl": {"net.core.somaxconn": "1"}, "namespaces": [{"type": "pid"}, {"type": "network"}]}
    assert take_network({"linux": linux}) == {}
    assert linux["sysctl"] == {"net.core.somaxconn": "1"}


@pytest.mark.parametrize("spec", [{}, {"linux": None}, {"linux": {}}, {"linux": {"sysctl": None}}])
def test_without_any_there_is_nothing_to_take(spec: dict[str, Any]) -> None:
    before = repr(spec)
    assert take_network(spec) == {}
    assert repr(spec) == before


@pytest.mark.parametrize("sysctl", [["net.x"], {"net.x": 1}])
def test_what_is_no_table_of_texts_is_refused(sysctl: object) -> None:
    with pytest.raises(InvalidArgument, match=r"linux\.sysctl"):
        take_network({"linux": {"sysctl": sysctl}})


def test_names_are_sysctls(root: Path) -> None:
    wanted = {"net.ipv4.conf.eth0/5.forwarding": "1", "net/core/somaxconn": "9"}
    with all_set(wanted, str(root), shared=False):
        assert (root / "net/ipv4/conf/eth0.5/forwarding").read_text() == "1"
        assert (root / "net/core/somaxconn").read_text() == "9"
    assert (root / "net/core/somaxconn").read_text() == "9"


def test_all_are_put_back_if_one_cannot_be_set(root: Path) -> None:
    wanted = {"net.core.somaxconn": "9", "net.ipv4.nosuch": "1"}
    with pytest.raises(InvalidArgument, match=r"sysctl net\.ipv4\.nosuch: the guest's kernel has none"):
        set_for_good(wanted, str(root))
    assert (root / "net/core/somaxconn").read_text() == "4096\n"


def test_in_a_shared_network_what_is_so_already_may_be_said_again(root: Path) -> None:
    set_for_good({"net.ipv4.ping_group_range": "1 0"}, str(root), shared=True)
    with pytest.raises(FailedPrecondition, match="'1\\\\t0', not '0 1'"):
        set_for_good({"net.ipv4.ping_group_range": "0 1"}, str(root), shared=True)
    assert (root / "net/ipv4/ping_group_range").read_text() == "1\t0\n"


def test_a_network_that_is_not_the_agents_is_left_alone() -> None:
    set_for_good({}, None)
    with pytest.raises(FailedPrecondition, match=r"net\.core\.somaxconn"):
        set_for_good({"net.core.somaxconn": "9"}, None)


@pytest.mark.parametrize(
    "name", ["net.", "net..core", "net//core", "net/../kernel/x", "net.core.\0", "net.\ud800"]
)
def test_a_name_that_is_none_is_refused(root: Path, name: str) -> None:
    with pytest.raises(InvalidArgument, match="no sysctl's name"):
        set_for_good({name: "1"}, str(root))


def test_what_cannot_be_read_or_written_is_named(root: Path) -> None:
    with pytest.raises(InvalidArgument, match=r"sysctl net\.ipv4: Is a directory"):
        set_for_good({"net.ipv4": "1"}, str(root))


def test_a_pods_parameters_may_be_any_of_its_kernels(tmp_path: Path) -> None:
    (tmp_path / "fs/mqueue").mkdir(parents=True)
    for name in ("msg_max", "a.b"):
        (tmp_path / "fs/mqueue" / name).write_text("10\n")
    set_for_good({"fs.mqueue.msg_max": "11", "fs/mqueue/a.b": "12", "fs.mqueue.a/b": "12"}, str(tmp_path))
    assert (tmp_path / "fs/mqueue/msg_max").read_text() == "11"
    assert (tmp_path / "fs/mqueue/a.b").read_text() == "12"
    with pytest.raises(InvalidArgument, match="none of this name"):
        set_for_good({"nodots": "1"}, str(tmp_path))
