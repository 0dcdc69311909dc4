"""Runtime options that clients send with a container: CRI's runtimeoptions.v1, and runc's, which nerdctl
and tests send to any runtime. runc's ProcessDetails says which exec a pid belongs to.
"""

from __future__ import annotations

from rpc.codec import Message, boolean, bytes_, string, uint32


class Options(Message, name="runtimeoptions.v1.Options"):
    type_url: str = string(1)
    config_path: str = string(2)
    config_body: bytes = bytes_(3)


class RuncOptions(Message, name="containerd.runc.v1.Options"):
    no_pivot_root: bool = boolean(1)
    no_new_keyring: bool = boolean(2)
    shim_cgroup: str = string(3)
    io_uid: int = uint32(4)
    io_gid: int = uint32(5)
    binary_name: str = string(6)
    root: str = string(7)
    systemd_cgroup: bool = boolean(9)
    criu_image_path: str = string(10)
    criu_work_path: str = string(11)
    task_api_address: str = string(12)
    task_api_version: int = uint32(13)


class ProcessDetails(Message, name="containerd.runc.v1.ProcessDetails"):
    exec_id: str = string(1)
