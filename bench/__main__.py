"""`python -m bench`: measures casemate against runc in a containerd of its own, for docs/."""

import argparse
import sys
import tempfile
from pathlib import Path

from bench.ctr import Ctr
from bench.instance import CHECKOUT, Instance, system_binaries
from bench.report import program_version, report
from bench.runs import Bench
from config.load import load
from images import builder, oci
from images.store import ImageStore
from rpc.errors import CasemateError, NotFound
from shim.vm import accel


def say(text: str) -> None:
    print(f"bench: {text}", file=sys.stderr, flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument(
        "--rounds", type=int, default=10, help="how often each thing is measured (default: 10)"
    )
    parser.add_argument("--output", type=Path, default=CHECKOUT / "docs/performance.md")
    arguments = parser.parse_args()
    if arguments.rounds < 3:
        parser.error("--rounds: a median of fewer than 3 says nothing")
    try:
        text = measure(arguments.rounds)
    except CasemateError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 1
    arguments.output.write_text(text)
    say(f"wrote {arguments.output}")
    return 0


def measure(rounds: int) -> str:
    binaries = system_binaries()
    if binaries is None:
        raise NotFound("no containerd on the PATH", hint="apt install containerd")
    settings = load()
    store = ImageStore(Path(settings.image_dir))
    if builder.current(store, builder.Options()) is None:
        builder.build(store, builder.Options(), progress=say)
    image = store.resolve(settings.profiles[settings.default_profile].image)
    with Instance(binaries) as instance, tempfile.TemporaryDirectory() as scratch:
        archive = Path(scratch) / "demo.tar"
        oci.write_demo(archive)
        instance.configure(f'image_dir = "{settings.image_dir}"\n')
        ctr = Ctr(instance, "bench")
        ctr.import_image(archive)
        measured = Bench(ctr, oci.DEMO, rounds, say).all()
    versions = {
        "containerd": binaries.version,
        "runc": program_version(["runc", "--version"]),
        "QEMU": program_version([settings.qemu, "--version"]),
    }
    found = accel.probe()
    return report(measured, image, versions, (found.kind, found.reason))


if __name__ == "__main__":
    raise SystemExit(main())
