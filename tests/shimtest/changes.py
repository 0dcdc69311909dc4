"""What the suite is built with instead of what its files say: what a client gives, for what stands for it.

It is text; suite.py builds with it, and page.py says why.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Change:
    """old: what a file has once."""

    file: str
    old: str
    new: str
    why: str = ""


def _of_their_own(*kinds: str) -> str:
    return "".join(f"{{Type: specs.{kind}Namespace}},\n" for kind in kinds)


CHANGES = (
    Change(
        "helpers.go",
        _of_their_own("Mount"),
        _of_their_own("Mount", "Network", "PID", "IPC", "UTS"),
        "Containers ask for no namespace but that of mounts, so for the host's network, processes, IPC and "
        "name, which are refused ([clients.md](clients.md)): they ask for their own.",
    ),
    Change(
        "helpers_sandbox.go",
        "ociOpts = append(ociOpts, so.ociOpts...)\n",
        """\
ociOpts = append(ociOpts, so.ociOpts...)
	status, err := env.sc.SandboxStatus(env.ctx, &sandboxAPI.SandboxStatusRequest{SandboxID: env.sandboxID})
	if err != nil {
		tb.Fatal(err)
	}
	ociOpts = append(ociOpts, func(s *specs.Spec) {
		for i := range s.Linux.Namespaces {
			path := &s.Linux.Namespaces[i].Path
			*path = strings.Replace(*path, "/proc/1/", fmt.Sprintf("/proc/%d/", status.GetPid()), 1)
		}
	})
""",
        "Those that share a namespace name `/proc/1/ns/KIND`, for the sandbox's: it is the sandbox's.",
    ),
    Change(
        "helpers_networksandbox_linux.go",
        'filepath.Join(tb.TempDir(), "network-sandbox")',
        "filepath.Clean(createRealNetworkSandbox(tb).path)",
        "Two sandboxes have an empty file for a network namespace: they have one of `ip netns add`.",
    ),
    Change(
        "helpers_networksandbox_linux.go",
        "os.OpenFile(nsPath, os.O_CREATE|os.O_EXCL|os.O_RDONLY, 0o444)",
        "os.Open(nsPath)",
    ),
    Change(
        "helpers.go",
        'strings.NewReplacer("/", "-", " ", "-").Replace(name)',
        'strings.NewReplacer("/", "-", " ", "-", "#", "-").Replace(name)',
        "A container's id may have a `#`, which containerd's own have not: it is a `-`.",
    ),
)
NO_SIGURG = "-X=runtime.godebugDefault=asyncpreemptoff=1"
"""Of Go's linker, for the program that the suite's containers run."""
NO_SIGURG_WHY = (
    "Most containers run /bin/forever, which any signal ends, and Go's runtime sends itself one to preempt a "
    "goroutine (SIGURG): in slow guests a tenth of them ended early, with what was executed beside them. "
    "It is built to do without."
)
WHYS = (*(change.why for change in CHANGES if change.why), NO_SIGURG_WHY)
