"""What an operator may write into a config file, checked strictly; and into Settings.

pydantic lives here and nowhere near a starting pod. It has no defaults on purpose: those are in
default.toml alone, where they are explained. Knows keys and values, not files (sources.py).
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

from config import annotations, cpulist, pci, values, waivers
from config.settings import Node, Profile, Settings, Timeouts, Vfio

Size = Annotated[int, BeforeValidator(values.size)]
Memory = Annotated[int, BeforeValidator(values.memory)]
AbsolutePath = Annotated[str, AfterValidator(values.absolute_path)]
PathOrAuto = Annotated[str, AfterValidator(values.absolute_path_or_auto)]
Seconds = Annotated[float, Field(gt=0, le=86_400, allow_inf_nan=False)]


class _Table(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class ProfileTable(_Table):
    vcpus: Annotated[int, AfterValidator(values.vcpus)]
    memory: Memory
    max_vcpus: Annotated[int, AfterValidator(values.vcpus_or_all)]
    max_memory: Annotated[int, BeforeValidator(values.memory_or_all)]
    image: Annotated[str, AfterValidator(values.image)]
    kernel_cmdline: Annotated[str, AfterValidator(values.kernel_cmdline)]
    cpu_model: Annotated[str, AfterValidator(values.cpu_model)]
    template: Literal["shared", "tenant", "off"]
    files: Literal["auto", "virtiofs", "9p"]
    hugepages: Literal["auto", "required", "never"]
    cpu_policy: Literal["shared", "dedicated"]

    def profile(self, name: str) -> Profile:
        return Profile(
            name=name,
            vcpus=self.vcpus,
            memory_bytes=self.memory,
            max_vcpus=self.max_vcpus,
            max_memory_bytes=self.max_memory,
            image=self.image,
            kernel_cmdline=self.kernel_cmdline,
            cpu_model=self.cpu_model,
            template=self.template,
            files=self.files,
            hugepages=self.hugepages,
            cpu_policy=self.cpu_policy,
        )


class TimeoutsTable(_Table):
    boot_s: Seconds
    agent_call_s: Seconds
    tcg_factor: Annotated[float, Field(ge=1, le=1000, allow_inf_nan=False)]
    empty_s: Seconds


class NodeTable(_Table):
    fork_server: bool
    pool: dict[Annotated[str, AfterValidator(values.profile_name)], Annotated[int, Field(ge=0, le=1000)]]
    pool_memory: Size
    pool_refill_s: Seconds


_Members = Annotated[
    list[Annotated[str, AfterValidator(pci.address)]], AfterValidator(values.partition_members)
]


class VfioTable(_Table):
    waive: list[Annotated[str, AfterValidator(waivers.known)]]
    partitions: Annotated[
        dict[Annotated[str, AfterValidator(values.partition_name)], _Members],
        AfterValidator(values.partitions),
    ]
    ready_s: Seconds
    reset_s: Seconds
    scrub: Annotated[str, AfterValidator(values.absolute_path_or_none)]
    scrub_s: Seconds
    cdi_dir: AbsolutePath
    cdi_kind: Annotated[str, AfterValidator(values.cdi_kind)]
    pod_resources: Annotated[str, AfterValidator(values.absolute_path_or_none)]


class ConfigTable(_Table):
    accel: Literal["auto", "kvm", "tcg"]
    transport: Literal["auto", "vsock", "serial"]
    qemu: AbsolutePath
    qemu_user: Annotated[str, Field(pattern=r"^[a-z_][a-z0-9_-]{0,31}$")]
    qemu_paths: list[AbsolutePath]
    virtiofsd: PathOrAuto
    firmware: PathOrAuto
    image_dir: AbsolutePath
    template_dir: AbsolutePath
    ledger_dir: AbsolutePath
    dedicated_cpus: Annotated[str, AfterValidator(cpulist.checked)]
    make_templates: bool
    templates_kept: Annotated[int, Field(ge=0, le=10_000)]
    default_profile: str
    profiles: dict[Annotated[str, AfterValidator(values.profile_name)], ProfileTable]
    allowed_annotations: list[Annotated[str, AfterValidator(annotations.known)]]
    log_level: Literal["error", "warning", "info", "debug"]
    address_format: Literal["auto", "plain", "json"]
    timeouts: TimeoutsTable
    node: NodeTable
    vfio: VfioTable
    console_size: Annotated[int, BeforeValidator(values.size), Field(ge=4096, le=1 << 30)]
    traces_kept: Annotated[int, Field(ge=0, le=1_000_000)]


def validate(merged: Mapping[str, Any]) -> Settings:
    """Settings from merged tables. Raises pydantic's ValidationError."""
    table = ConfigTable.model_validate(merged)
    return Settings(
        accel=table.accel,
        transport=table.transport,
        qemu=table.qemu,
        qemu_user=table.qemu_user,
        qemu_paths=tuple(table.qemu_paths),
        virtiofsd=table.virtiofsd,
        firmware=table.firmware,
        image_dir=table.image_dir,
        template_dir=table.template_dir,
        ledger_dir=table.ledger_dir,
        dedicated_cpus=table.dedicated_cpus,
        make_templates=table.make_templates,
        templates_kept=table.templates_kept,
        default_profile=table.default_profile,
        profiles={name: profile.profile(name) for name, profile in table.profiles.items()},
        allowed_annotations=tuple(table.allowed_annotations),
        log_level=table.log_level,
        address_format=table.address_format,
        timeouts=Timeouts(**table.timeouts.model_dump()),
        node=Node(
            fork_server=table.node.fork_server,
            pool=table.node.pool,
            pool_memory_bytes=table.node.pool_memory,
            pool_refill_s=table.node.pool_refill_s,
        ),
        vfio=Vfio(
            waive=tuple(table.vfio.waive),
            partitions={name: tuple(members) for name, members in table.vfio.partitions.items()},
            ready_s=table.vfio.ready_s,
            reset_s=table.vfio.reset_s,
            scrub=table.vfio.scrub,
            scrub_s=table.vfio.scrub_s,
            cdi_dir=table.vfio.cdi_dir,
            cdi_kind=table.vfio.cdi_kind,
            pod_resources=table.vfio.pod_resources,
        ),
        console_bytes=table.console_size,
        traces_kept=table.traces_kept,
    )


def known_keys(path: tuple[str, ...]) -> list[str]:
    """The keys that the table at path may have; [] where any name goes or there is no table."""
    match path:
        case ():
            return list(ConfigTable.model_fields)
        case ("timeouts",):
            return list(TimeoutsTable.model_fields)
        case ("node",):
            return list(NodeTable.model_fields)
        case ("vfio",):
            return list(VfioTable.model_fields)
        case ("profiles", _):
            return list(ProfileTable.model_fields)
    return []
