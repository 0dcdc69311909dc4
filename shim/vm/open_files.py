"""How many files a server may hold open for a guest."""

import resource

MOST_FILES = 1 << 20  # virtiofsd's own default


def open_files(memory_bytes: int) -> int:
    """One, with its inode, for each that the guest remembers. memory_bytes: the guest's.

    Linux spends about a KiB on each (struct fuse_inode and a dentry): one that says it remembers more lies.
    """
    return min(memory_bytes >> 10, MOST_FILES)


def allowed(files: int) -> int:
    """As many of them as this process may have its children open: a server ends where it may not.

    More than the hard limit takes CAP_SYS_RESOURCE, which root in a container or a VM of a cloud may lack.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard == resource.RLIM_INFINITY or files <= hard:
        return files
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, files))
    except ValueError:  # how Python tells EPERM here
        return hard
    return files
