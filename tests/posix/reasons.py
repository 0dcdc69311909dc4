"""Why something differs from runc: a line for each cause, found by looking into it. It knows names only."""

import re
from dataclasses import dataclass

VIRTIOFS, NINEP = "casemate-virtiofs", "casemate-9p"


@dataclass(frozen=True, slots=True)
class Reason:
    """tests: a regular expression for whole names. place: '' for all."""

    why: str
    tests: str
    way: str = VIRTIOFS
    place: str = ""

    def fits(self, way: str, place: str, test: str) -> bool:
        return way == self.way and self.place in ("", place) and bool(re.fullmatch(self.tests, test))


REASONS = (
    Reason(
        "Linux has POSIX access lists only in the first file system of a virtio-fs mount, and a container's "
        "files are in others below it (fs/fuse/inode.c; with virtiofsd's `posix_acl` it was the same). Modes "
        "and owners decide; of a list that a file has on the host, the mask is in the mode's group bits",
        "linux access_lists_decide",
    ),
    Reason(
        "this virtiofsd does not have FUSE_TMPFILE; most programs then make a name and unlink it",
        "linux files_without_a_name_get_one",
    ),
    Reason(
        "this virtiofsd does not have FUSE_STATX: `stat` prints `-` for the time of birth",
        "linux times_of_birth_are_told",
    ),
    Reason(
        "virtiofsd takes no ioctl(2): no lsattr, no chattr",
        "linux flags_of_an_inode_are_told",
    ),
    Reason(
        "overlayfs, as containerd mounts it, has no file handles; FUSE has",
        "linux handles_stand_for_files",
        place="root file system",
    ),
    Reason(
        "left out: pathconf(3) does not know how many links a file may have. The host's file system decides",
        "pjdfstest link::link_count_max",
        place="volume",
    ),
    Reason(
        "locks are kept by the guest's kernel: the containers of a pod see each other's, but not the host's "
        "nor another pod's. QEMU's virtiofsd could pass them on, but refuses to wait for one (F_SETLKW)",
        "beside (flock|record_lock)_of_the_host_is_seen",
        place="volume",
    ),
    Reason(
        "inotify tells what the guest itself changes; what the host changes is seen when looked at",
        "beside changes_of_the_host_are_told",
        place="volume",
    ),
    Reason(
        "the guest has pages of its own; it asks for the file's again when it is opened",
        "beside writes_of_the_host_are_seen_in_mapped_memory",
        place="volume",
    ),
)


def known(way: str, place: str, test: str) -> str:
    """The reason, or ''."""
    return next((reason.why for reason in REASONS if reason.fits(way, place, test)), "")
