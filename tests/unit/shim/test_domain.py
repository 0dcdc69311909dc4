"""The virtual machine that a pod gets, as libvirt is told: golden files, and libvirt's own schema."""

from __future__ import annotations

import ctypes
import ctypes.util
import os
import xml.etree.ElementTree as ET
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from config.settings import Profile
from images.image import GuestImage
from rpc.errors import FailedPrecondition, ResourceExhausted
from shim.vm import designer
from shim.vm.accel import Acceleration
from shim.vm.backing import STRICT, Backing, Cell
from shim.vm.designer import Files, Places, Way, design, files_of, transport_of
from shim.vm.domain import Domain, Memory, element, escape, text
from shim.vm.passthrough import IOMMUFD, LEGACY, Access, Function
from shim.vm.pinning import Pinning

QEMU_ARGUMENT = "{http://libvirt.org/schemas/domain/qemu/1.0}arg"
GOLDEN = Path(__file__).parent / "golden"
SCHEMA = Path("/usr/share/libvirt/schemas/domain.rng")
POD = Path("/run/casemate/pods/0123456789abcdef")
IMAGE = Path("/var/lib/casemate/images/by-digest/abc")
KVM, TCG = Acceleration("kvm", "it ran a guest"), Acceleration("tcg", "there is no KVM")
DEFAULT = Profile(
    name="default",
    vcpus=1,
    memory_bytes=128 << 20,
    max_vcpus=0,
    max_memory_bytes=0,
    image="default",
    kernel_cmdline="",
    cpu_model="auto",
    template="shared",
    files="virtiofs",
    hugepages="auto",
    cpu_policy="shared",
)


def image(*, initrd: bool) -> GuestImage:
    return GuestImage(
        name="default",
        digest="sha256:abc",
        directory=IMAGE,
        kernel=IMAGE / "vmlinux",
        initrd=IMAGE / "initrd.cpio" if initrd else None,
        rootfs=IMAGE / "rootfs.erofs",
        cmdline="root=/dev/vda ro rootfstype=erofs",
        manifest={},
    )


def designed(
    accel: Acceleration,
    transport: str,
    *,
    profile: Profile = DEFAULT,
    initrd: bool = True,
    way: Way = Way.BOOT,
    files: Files = Files.VIRTIOFS,
    functions: tuple[Function, ...] = (),
    access: Access | None = None,
    backing: Backing | None = None,
    pinning: Pinning | None = None,
) -> Domain:
    return design(
        profile,
        image(initrd=initrd),
        accel,
        transport,
        files,
        Places(POD / "console.sock", POD / "agent.sock", POD / "share.sock", POD / "ram/ram"),
        "/usr/bin/qemu-system-x86_64",
        "/usr/share/qemu/qboot.rom",
        way,
        functions,
        access,
        backing,
        pinning,
    )


GPU = Function("0000:3b:00.0", "an H100", "gpu", 12, "vfio0", 0, 0, bar_bytes=128 << 30)
CARD = Function("0001:65:00.0", "a card", "gpu", 13, "vfio1", 1, 0, several=True)
SOUND = Function("0001:65:00.1", "its sound", "audio", 13, "vfio2", 1, 1, several=True)


WITH_DEVICES = "kvm-vsock-devices"
EDU = Function("0000:07:00.0", "an edu", "other", 14, "vfio3", 2, 0)


PLUGGED = ("kvm-vsock-devices-template", "kvm-vsock-devices-restore")
EDU_SECOND = replace(EDU, port=1)
HUGE_CELL = Backing(2 << 20, cells=(Cell(1, 128 << 20, STRICT, (4, 5)),))


DOMAINS = {
    "kvm-vsock-devices": designed(KVM, "vsock", functions=(GPU, CARD, SOUND), access=Access(IOMMUFD)),
    "kvm-vsock-9p-devices": designed(
        KVM, "vsock", files=Files.NINEP, functions=(GPU,), access=Access(LEGACY, "libvirt is 9.0")
    ),
    "kvm-vsock-devices-numa": designed(
        KVM,
        "vsock",
        profile=DEFAULT.replace(vcpus=3, memory_bytes=2 << 30),
        functions=(replace(GPU, node=1), replace(CARD, node=0), replace(SOUND, node=0), EDU),
        access=Access(IOMMUFD),
        backing=Backing(2 << 20, cells=(Cell(0, 1 << 30, STRICT), Cell(1, 1 << 30, STRICT, (8, 9, 24)))),
    ),
    "kvm-vsock-devices-node": designed(
        KVM,
        "vsock",
        functions=(replace(GPU, node=1),),
        access=Access(IOMMUFD),
        backing=Backing(0, "none are free", (Cell(1, 128 << 20, cpus=(4, 5)),)),
    ),
    "kvm-vsock-devices-hugepages": designed(
        KVM, "vsock", functions=(GPU,), access=Access(IOMMUFD), backing=Backing(2 << 20)
    ),
    "kvm-vsock-devices-template": designed(
        KVM, "vsock", way=Way.TEMPLATE, files=Files.NINEP, functions=(GPU, EDU_SECOND), backing=HUGE_CELL
    ),
    "kvm-vsock-devices-restore": designed(
        KVM,
        "vsock",
        way=Way.RESTORE,
        files=Files.NINEP,
        functions=(GPU, EDU_SECOND),
        access=Access(IOMMUFD),
        backing=HUGE_CELL,
    ),
    "kvm-vsock-devices-dedicated": designed(
        KVM,
        "vsock",
        profile=DEFAULT.replace(vcpus=3, memory_bytes=2 << 30),
        functions=(replace(GPU, node=1), replace(CARD, node=0), replace(SOUND, node=0)),
        access=Access(IOMMUFD),
        backing=Backing(0, "", (Cell(0, 1 << 30), Cell(1, 1 << 30))),
        pinning=Pinning((2, 66, 8), (72,)),
    ),
    "kvm-vsock-restore-dedicated": designed(
        KVM, "vsock", way=Way.RESTORE, profile=DEFAULT.replace(vcpus=2), pinning=Pinning((4, 5), (0, 1))
    ),
    "tcg-serial": designed(TCG, "serial"),
    "kvm-vsock": designed(KVM, "vsock"),
    "kvm-vsock-template": designed(KVM, "vsock", way=Way.TEMPLATE),
    "kvm-vsock-restore": designed(KVM, "vsock", way=Way.RESTORE),
    "kvm-vsock-9p": designed(KVM, "vsock", files=Files.NINEP),
    "kvm-vsock-9p-template": designed(KVM, "vsock", files=Files.NINEP, way=Way.TEMPLATE),
    "kvm-vsock-9p-restore": designed(KVM, "vsock", files=Files.NINEP, way=Way.RESTORE),
    "kvm-serial-large": designed(
        KVM,
        "serial",
        profile=DEFAULT.replace(
            vcpus=4, memory_bytes=512 << 20, cpu_model="Skylake-Client", kernel_cmdline="debug x='<&>'"
        ),
        initrd=False,
    ),
}


def parse(xml: str | bytes) -> ET.Element:
    return ET.fromstring(xml)  # noqa: S314 - it is ours


def pretty(xml: str) -> str:
    tree = parse(xml)
    ET.indent(tree)
    return ET.tostring(tree, encoding="unicode") + "\n"


@pytest.mark.parametrize("name", DOMAINS)
def test_a_domain_is_as_it_was_reviewed(name: str) -> None:
    """With CASEMATE_UPDATE_GOLDEN=1 the file is written instead: then read the diff."""
    path, xml = GOLDEN / f"{name}.xml", pretty(DOMAINS[name].xml())
    if os.environ.get("CASEMATE_UPDATE_GOLDEN"):
        path.write_text(xml)
    assert xml == path.read_text()


def relax_ng_errors(xml: str, schema: Path) -> list[str]:
    """What libxml2, which libvirt itself validates with, finds wrong."""
    library = ctypes.CDLL(ctypes.util.find_library("xml2") or "libxml2.so.2")
    for name in ("xmlRelaxNGNewParserCtxt", "xmlRelaxNGParse", "xmlRelaxNGNewValidCtxt", "xmlReadMemory"):
        getattr(library, name).restype = ctypes.c_void_p
    errors: list[str] = []
    kind = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_char_p)
    note = kind(lambda _, message: errors.append(message.decode()))
    library.xmlSetGenericErrorFunc(None, note)
    parser = ctypes.c_void_p(library.xmlRelaxNGNewParserCtxt(str(schema).encode()))
    grammar = ctypes.c_void_p(library.xmlRelaxNGParse(parser))
    assert grammar.value, "the schema itself could not be read"
    data = xml.encode()
    document = ctypes.c_void_p(library.xmlReadMemory(data, len(data), b"domain.xml", None, 0))
    checker = ctypes.c_void_p(library.xmlRelaxNGNewValidCtxt(grammar))
    result = library.xmlRelaxNGValidateDoc(checker, document)
    library.xmlFreeDoc(document)
    library.xmlRelaxNGFreeValidCtxt(checker)
    library.xmlRelaxNGFree(grammar)
    library.xmlRelaxNGFreeParserCtxt(parser)
    library.xmlSetGenericErrorFunc(None, None)
    return [] if result == 0 else errors or [f"libxml2 says {result}"]


@pytest.mark.parametrize("name", DOMAINS)
def test_a_domain_is_valid_by_libvirts_schema(name: str) -> None:
    if not SCHEMA.exists():
        pytest.skip("libvirt's schemas are not installed (Debian: libvirt0)")
    xml = DOMAINS[name].xml()
    if not _knows_iommufd():
        xml = xml.replace("<driver iommufd='yes'/>", "")
    assert relax_ng_errors(xml, SCHEMA) == []


def _knows_iommufd() -> bool:
    """Since 12.1, and no domain of an older libvirt's has it (shim/vm/versions.py)."""
    return "iommufd" in SCHEMA.with_name("domaincommon.rng").read_text()


def test_the_schema_is_not_satisfied_by_anything() -> None:
    if not SCHEMA.exists():
        pytest.skip("libvirt's schemas are not installed (Debian: libvirt0)")
    wrong = DOMAINS["tcg-serial"].xml().replace("<vcpu>", "<vcpus>").replace("</vcpu>", "</vcpus>")
    assert relax_ng_errors(wrong, SCHEMA) != []


# --- what the policy decides ---


@pytest.mark.parametrize("name", DOMAINS)
def test_no_two_devices_share_a_slot_and_none_takes_the_chipsets(name: str) -> None:
    tree = parse(DOMAINS[name].xml())
    of_the_host = list(tree.iterfind("devices/hostdev/source/address"))
    places = [
        tuple(int(found.attrib[part]) for part in ("bus", "slot", "function"))
        for found in tree.iter("address")
        if found not in of_the_host
    ]
    assert len(places) == len(set(places))
    assert not {(0, 0), (0, 31)} & {place[:2] for place in places}
    # A guest looks for the other functions of a slot where the first one says that there are some.
    shared = {place[:2] for place in places if place[2]}
    several = {
        (int(f.attrib["bus"]), int(f.attrib["slot"])) for f in tree.iter("address") if f.get("multifunction")
    }
    assert shared == several


@pytest.mark.parametrize("name", DOMAINS)
def test_a_guest_can_change_nothing_of_its_image(name: str) -> None:
    tree = parse(DOMAINS[name].xml())
    disks = tree.findall("devices/disk")
    assert disks
    assert all(disk.find("readonly") is not None for disk in disks)


@pytest.mark.parametrize("name", DOMAINS)
def test_a_guest_that_ends_takes_its_qemu_with_it(name: str) -> None:
    tree = parse(DOMAINS[name].xml())
    assert [tree.findtext(f"on_{event}") for event in ("poweroff", "reboot", "crash")] == ["destroy"] * 3


def test_the_kernel_is_told_how_to_reach_the_shim() -> None:
    tree = parse(DOMAINS["tcg-serial"].xml())
    words = (tree.findtext("os/cmdline") or "").split()
    assert "casemate.transport=serial" in words
    assert not [word for word in words if word.startswith("casemate.port")]
    words = (parse(DOMAINS["kvm-vsock"].xml()).findtext("os/cmdline") or "").split()
    assert {"casemate.transport=vsock", "pci=lastbus=5", "console=ttyS0", "panic=-1"} <= set(words)


def test_a_profiles_parameters_come_last() -> None:
    """The kernel takes the last of two."""
    cmdline = parse(DOMAINS["kvm-serial-large"].xml()).findtext("os/cmdline") or ""
    assert cmdline.startswith("root=/dev/vda ")
    assert cmdline.endswith(" debug x='<&>'")


@pytest.mark.parametrize(
    ("accel", "model", "expected"),
    [
        (KVM, "auto", "host-passthrough"),
        (TCG, "auto", "maximum"),
        (KVM, "Skylake-Client", "Skylake-Client"),
        (TCG, "qemu64", "qemu64"),
    ],
)
def test_the_cpu_is_the_profiles_or_the_best_there_is(accel: Acceleration, model: str, expected: str) -> None:
    assert designer.cpu_model(DEFAULT.replace(cpu_model=model), accel) == expected


@pytest.mark.parametrize("name", DOMAINS)
def test_no_guest_gets_virtualization_of_its_own(name: str) -> None:
    features = parse(DOMAINS[name].xml()).findall("cpu/feature")
    assert {(item.get("name"), item.get("policy")) for item in features} == {
        ("vmx", "disable"),
        ("svm", "disable"),
    }


@pytest.mark.parametrize("name", ["kvm-vsock", "kvm-serial-large"])
def test_no_guest_counts_the_hosts_events(name: str) -> None:
    pmu = parse(DOMAINS[name].xml()).find("features/pmu")
    assert pmu is not None
    assert pmu.get("state") == "off"


def test_only_an_emulator_gets_a_cache_for_code() -> None:
    assert "tb-cache" in DOMAINS["tcg-serial"].xml()
    assert "tb-cache" not in DOMAINS["kvm-vsock"].xml()


def test_more_memory_than_the_host_has_is_refused_with_both_numbers() -> None:
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    with pytest.raises(ResourceExhausted, match=rf"1048576 MiB: this host has {total >> 20} MiB"):
        designed(TCG, "serial", profile=DEFAULT.replace(memory_bytes=1 << 40))


# --- vsock or serial ---


def test_vsock_is_used_where_the_host_has_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    device = tmp_path / "vhost-vsock"
    monkeypatch.setattr(designer, "VSOCK_DEVICE", str(device))
    assert transport_of("auto") == "serial"
    assert transport_of("serial") == "serial"
    with pytest.raises(FailedPrecondition, match=r"transport = vsock, but .*vhost-vsock cannot be opened"):
        transport_of("vsock")
    device.touch()
    assert [transport_of(wanted) for wanted in ("auto", "vsock", "serial")] == ["vsock", "vsock", "serial"]


# --- files and memory ---


@pytest.mark.parametrize(
    ("wanted", "transport", "features", "qemu", "lacking"),
    [
        ("auto", "vsock", ["9p"], (8, 2), ""),
        ("9p", "vsock", ["9p", "net"], (11, 1), ""),
        ("auto", "serial", ["9p"], (8, 2), "goes over vsock alone"),
        ("auto", "vsock", ["virtiofs"], (8, 2), "kernel of image default has no 9p"),
        ("auto", "vsock", ["9p"], (8, 1), "QEMU is older than 8.2"),
        ("auto", "vsock", ["9p"], None, "QEMU is older than 8.2"),
    ],
)
def test_9p_is_used_where_all_is_there_that_it_takes(
    wanted: str, transport: str, features: list[str], qemu: tuple[int, int] | None, lacking: str
) -> None:
    known = replace(image(initrd=True), name="default", manifest={"features": features})
    assert files_of("virtiofs", transport, known, qemu) is Files.VIRTIOFS
    assert files_of(wanted, transport, known, qemu) is (Files.VIRTIOFS if lacking else Files.NINEP)
    if lacking:
        with pytest.raises(FailedPrecondition, match=f"files = 9p, but .*{lacking}"):
            files_of("9p", transport, known, qemu)


def test_virtiofsd_sees_the_guests_memory_and_nobody_else_does() -> None:
    for name, domain in DOMAINS.items():
        source = parse(domain.xml()).find("memoryBacking/source")
        assert (source is None) is ("9p" in name)
        if name in PLUGGED:
            continue
        booted = name in ("tcg-serial", "kvm-vsock", "kvm-serial-large") or name.startswith(WITH_DEVICES)
        assert ("virtiofs" in domain.xml()) is booted


def test_ram_is_filled_before_it_is_mapped_for_devices_and_only_then() -> None:
    for name, domain in DOMAINS.items():
        allocation = parse(domain.xml()).find("memoryBacking/allocation")
        filled = "devices" in name and name != "kvm-vsock-devices-template"
        assert (allocation is not None) is filled
        assert (domain.hole_bytes > 0) is ("devices" in name)


def test_a_template_has_room_for_devices_and_none_of_them() -> None:
    template, restored = (parse(DOMAINS[name].xml()) for name in PLUGGED)
    files, both = Files.NINEP, (GPU, EDU_SECOND)
    booted = parse(designed(KVM, "vsock", files=files, functions=both, backing=HUGE_CELL).xml())
    for shape in (template, restored):
        assert shape.findall("devices/hostdev") == []
        assert ports(shape) == ports(booted)
    assert len(booted.findall("devices/hostdev")) == 2
    assert len(set(ports(booted))) == 6
    tuned = [template.find(name) for name in ("numatune", "cputune", "memoryBacking/hugepages")]
    assert tuned == [None, None, None]


def ports(domain: ET.Element) -> list[tuple[str | None, ...]]:
    found = domain.findall("devices/controller[@model='pcie-root-port']")
    places = [(each, each.find("address")) for each in found]
    return [(e.get("index"), at.get("slot"), at.get("function")) for e, at in places if at is not None]


def test_what_a_restored_guest_writes_never_reaches_the_template() -> None:
    words = [word.get("value") for word in parse(DOMAINS["kvm-vsock-9p-restore"].xml()).iter(QEMU_ARGUMENT)]
    (ram,) = (word for word in words if word and word.startswith("memory-backend-file"))
    assert {"share=off", "readonly=on", "rom=off"} <= set(ram.split(","))
    assert f"mem-path={POD}/ram/ram" in ram


def test_no_machine_has_an_id_that_its_clones_would_have_too() -> None:
    for domain in DOMAINS.values():
        words = [word.get("value") for word in parse(domain.xml()).iter(QEMU_ARGUMENT)]
        assert words[words.index("-uuid") + 1] == "00000000-0000-0000-0000-000000000000"


def test_a_path_with_a_comma_is_one_path() -> None:
    domain = replace(DOMAINS["kvm-vsock-9p-restore"], memory=Memory.MAPPED, ram_file="/a,b/ram")
    assert "mem-path=/a,,b/ram,share=off" in domain.xml()


# --- XML ---

VALID = st.text(
    st.characters(exclude_categories=["Cs"], exclude_characters="\r\n\t\ufffe\uffff").filter(
        lambda character: ord(character) >= 0x20
    )
)


@given(VALID)
def test_any_text_survives_as_text_and_as_attribute(value: str) -> None:
    tree = parse(text("a", value, name=value))
    assert (tree.text or "") == value
    assert tree.attrib["name"] == value


@given(st.text(st.characters(codec=None), max_size=20))
def test_what_xml_cannot_hold_is_refused_and_nothing_is_changed_in_silence(value: str) -> None:
    try:
        xml = text("a", value)
    except ValueError:
        return
    assert (parse(xml.encode()).text or "") == value


@pytest.mark.parametrize("value", ["\0", "a\x1bb", "\ud800", "\ufffe", "\uffff"])
def test_characters_that_are_not_xmls_are_refused(value: str) -> None:
    with pytest.raises(ValueError, match="character"):
        escape(value)


def test_an_element_is_closed_whether_empty_or_not() -> None:
    assert element("a") == "<a/>"
    assert element("a", element("b", type_="c", n=1)) == "<a><b type='c' n='1'/></a>"


def test_huge_pages_are_a_memfd_whatever_the_files_come_by() -> None:
    """QEMU makes them of no mount of the host's; virtiofsd has to see them, 9p does not mind."""
    for files in Files:
        domain = designed(KVM, "vsock", files=files, functions=(GPU,), backing=Backing(1 << 30))
        tree = parse(domain.xml()).find("memoryBacking")
        assert tree is not None
        assert [each.tag for each in tree] == ["hugepages", "source", "access", "allocation"]


def test_a_template_is_the_same_whoever_has_cpus_of_its_own() -> None:
    pinned = designed(KVM, "vsock", way=Way.TEMPLATE, pinning=Pinning((4,), (0,)))
    assert pinned == DOMAINS["kvm-vsock-template"]
