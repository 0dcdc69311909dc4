"""A pod's files under a real KVM: by 9p, on memory that is the template's, where it has none but its own; by
virtio-fs where it is given a directory. What programs expect of files is bench/trials.py.
"""

from typing import Any

INSIDE = "files"


def test_a_pod_with_its_own_files_has_them_by_9p(seen: Any) -> None:
    (pod,) = seen["alone"]["pods"]
    assert (pod["source"], pod["transport"], pod["files"]) == ("restore", "vsock", "9p"), seen["alone"]
    kinds = {line.split()[1]: line.split()[2] for line in seen["alone"]["mounts"].splitlines()}
    assert (kinds["/"], kinds["/etc/given"]) == ("9p", "9p")


def test_programs_find_a_local_file_system_there_but_for_fractions_of_seconds(seen: Any) -> None:
    """Linux' 9p client keeps whole seconds."""
    *differences, tried = seen["alone"]["tried"]
    assert tried == "18 tried"
    assert [line.split(":")[0] for line in differences] == ["times_hold"]


def test_a_file_that_was_given_is_the_hosts_both_ways(seen: Any) -> None:
    alone = seen["alone"]
    assert (alone["first"], alone["second"]) == ("first\n", "second, and longer\n")
    assert alone["host"] == "from the guest\n"


def test_its_memory_is_the_templates_until_it_writes(seen: Any) -> None:
    assert seen["alone"]["maps"]
    assert all(line.split()[1] == "rw-p" for line in seen["alone"]["maps"])  # private: copy on write
    assert not seen["alone"]["template_changed"]


def test_a_pod_that_is_given_a_directory_has_virtio_fs_and_all_that_programs_expect(seen: Any) -> None:
    (pod,) = seen["shared"]["pods"]
    assert (pod["source"], pod["files"]) == ("restore", "virtiofs"), seen["shared"]
    assert seen["shared"]["tried"] == ["18 tried"]


def test_what_the_host_swaps_in_a_directory_is_seen(seen: Any) -> None:
    assert (seen["shared"]["first"], seen["shared"]["second"]) == ("one", "two")
