"""Names of the spans of a trace, declared once. What each covers is said beside it.

A span's name is all that a dashboard has to find it by: rename none without a note in CHANGELOG.md.
"""

START = "start"  # the whole `start` command, from the kernel's exec to its exit
INTERPRETER = "interpreter"  # exec of `start` to the first line of ours
BIND = "bind"  # arguments, pod directory, journal, socket
DETACH = "detach"  # from the socket to a daemon in its place; who forked it
OWN_NAMESPACES = "namespaces"  # of processes and mounts
POD_NETWORK = "network"  # entered, or made
POD_CGROUP = "cgroup"  # made in every hierarchy, and entered; imports pass beside it
SERVE = "serve"  # the ttrpc server answers

POD_READY = "pod.ready"  # from the daemon's first line to an agent that answered
SETTINGS = "settings"  # operator's settings and the OCI spec
DEVICES_ASK = "devices.ask"  # a kubelet is asked which it has allocated to the pod
DEVICES_CLAIM = "devices.claim"  # devices, CPUs of its own: chosen, claimed; judged, bound to vfio-pci
IMAGE = "image"  # guest image found, verified, leased
FILES = "files"  # file server spawned
LIBVIRT_IMPORT = "libvirt.import"
LIBVIRT_OPEN = "libvirt.open"
LIBVIRT_CREATE = "libvirt.create"  # until QEMU runs the guest; with devices, of which pages RAM is
RAM_COPY = "ram.copy"  # the template's RAM into the guest's, while QEMU starts
STATE_LOAD = "state.load"  # QEMU reads the template's state
SHARE_PLUG = "share.plug"  # the file system's device
DEVICES_PLUG = "devices.plug"  # those of the host's, into a restored machine; of which pages its RAM is
GUEST_RESUME = "guest.resume"  # a restored guest runs until the agent answered
POOL_RESUME = "pool.resume"  # a machine of the pool goes on
POOL_GREET = "pool.greet"  # its agent is told whose it is
GUEST_BOOT = "guest.boot"  # QEMU runs until the agent answered
DEVICES_READY = "devices.ready"  # the guest has made of each what the pod is given; which way of VFIO's
GUEST_SHARE = "guest.share"  # the guest mounts the share

CREATE = "task.create"
ROOTFS = "rootfs"  # the container's mounts on the host
CREATE_WAITS = "task.create.waits"  # for the pod to be ready
DISK_PLUG = "disk.plug"  # a block device of the container's, into the machine
HOOKS = "hooks"  # of the client's on the host; which kind
GUEST_CREATE = "guest.create"  # crun create
GUEST_NETWORK = "guest.network"  # the guest has the interfaces that the pod's namespace has
START_TASK = "task.start"
RUN = "task.run"  # from the answer to Start to the exit of the container's init
CLIENT = "client"  # from that to the client's Delete
DELETE = "task.delete"
DRAIN = "stdio.drain"  # the last bytes of output
SYNC = "guest.sync"  # the guest's dirty pages reach the host
MACHINE_STOP = "machine.stop"  # QEMU killed, its file server gone
DEVICES_RELEASE = "devices.release"  # QEMU gone, each reset, compared, given back to the host
UNMOUNT = "rootfs.unmount"
