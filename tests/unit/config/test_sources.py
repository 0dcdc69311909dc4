"""Config files: merging, inheriting, provenance, and what is said about a mistake."""

import tomllib
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from config import places
from config.schema import ConfigTable, ProfileTable, TimeoutsTable, known_keys
from config.sources import Origin, line_of, merge, read_defaults, read_settings
from rpc.errors import InvalidArgument
from tests.unit.config.conftest import Write


def mistake() -> InvalidArgument:
    with pytest.raises(InvalidArgument) as caught:
        read_settings()
    return caught.value


# --- defaults ---


def test_default_toml_sets_every_option_and_nothing_else() -> None:
    table = tomllib.loads(Path(places.DEFAULT_FILE).read_text())
    assert set(table) == set(ConfigTable.model_fields)
    assert set(table["timeouts"]) == set(TimeoutsTable.model_fields)
    assert set(table["profiles"]["default"]) == set(ProfileTable.model_fields)


def test_default_toml_explains_every_option() -> None:
    """Each key has a comment right above it, or is a profile's difference from the default one."""
    lines = Path(places.DEFAULT_FILE).read_text().split("[profiles.small]")[0].splitlines()
    bare = [
        line
        for above, line in pairwise(lines)
        if "=" in line and not line.startswith("#") and not above.startswith("#")
    ]
    assert bare == []


def test_settings_of_a_host_without_config_are_the_defaults(host: Path) -> None:
    settings = read_settings().settings
    assert settings == read_defaults().settings
    assert settings.profiles["default"].memory_bytes == 256 << 20
    assert settings.profiles["small"].memory_bytes == 128 << 20
    assert settings.profiles["large"].vcpus == 4
    assert settings.console_bytes == 1 << 20
    assert settings.timeouts.boot_s == 30.0


# --- merging ---


def test_drop_ins_are_merged_in_order_and_key_by_key(write: Write) -> None:
    write("config.toml", 'accel = "kvm"\ntraces_kept = 1\n[profiles.small]\nvcpus = 2\n')
    write("config.d/20-b.toml", "traces_kept = 3\n")
    write("config.d/10-a.toml", 'traces_kept = 2\n[profiles.small]\nmemory = "64MiB"\n')
    write("config.d/30-c.txt", "not read")
    settings = read_settings().settings
    assert settings.accel == "kvm"
    assert settings.traces_kept == 3
    small = settings.profiles["small"]
    assert (small.vcpus, small.memory_bytes) == (2, 64 << 20)


def test_lists_are_replaced_as_a_whole(write: Write) -> None:
    write("config.toml", 'allowed_annotations = ["dev.casemate.memory"]\n')
    assert read_settings().settings.allowed_annotations == ("dev.casemate.memory",)


def test_a_new_profile_has_the_default_profiles_values(write: Write) -> None:
    write("config.toml", '[profiles.gpu]\nmemory = "4GiB"\n[profiles.default]\nkernel_cmdline = "debug"\n')
    profile = read_settings().settings.profiles["gpu"]
    assert profile.name == "gpu"
    assert profile.memory_bytes == 4 << 30
    assert profile.kernel_cmdline == "debug"
    assert profile.vcpus == 1


def test_origins_say_which_file_and_line_set_a_value(write: Write) -> None:
    path = write("config.d/a.toml", 'log_level = "debug"\n\n[profiles.default]\nvcpus = 2\n')
    loaded = read_settings()
    assert loaded.place(("log_level",)) == f"{path}:1"
    assert loaded.place(("profiles", "default", "vcpus")) == f"{path}:4"
    # inherited: where it was written
    assert loaded.place(("profiles", "small", "vcpus")) == f"{path}:4"
    assert loaded.origins["profiles", "small", "vcpus"].key == ("profiles", "default", "vcpus")
    assert loaded.place(("accel",)).startswith(places.DEFAULT_FILE + ":")


tables: st.SearchStrategy[dict[str, Any]] = st.recursive(
    st.dictionaries(st.sampled_from("abcd"), st.integers() | st.lists(st.integers(), max_size=2), max_size=3),
    lambda inner: st.dictionaries(st.sampled_from("abcd"), inner | st.integers(), max_size=3),
    max_leaves=8,
)


def leaves(table: dict[str, Any], at: tuple[str, ...] = ()) -> dict[tuple[str, ...], Any]:
    found: dict[tuple[str, ...], Any] = {}
    for key, value in table.items():
        if isinstance(value, dict):
            found |= leaves(value, (*at, key))
        else:
            found[*at, key] = value
    return found


@given(st.lists(tables, max_size=4))
def test_merged_each_value_is_its_origins(layers: list[dict[str, Any]]) -> None:
    merged: dict[str, Any] = {}
    origins: dict[tuple[str, ...], Origin] = {}
    for number, layer in enumerate(layers):
        merge(merged, layer, origins, str(number))
    for path, value in leaves(merged).items():
        assert leaves(layers[int(origins[path].path)])[path] == value
    # and nothing of the last layer is lost
    if layers:
        assert leaves(layers[-1]).items() <= leaves(merged).items()
    # no origin without a value or a table
    for path in origins:
        at: Any = merged
        for key in path:
            at = at[key]


@given(tables, tables)
def test_merging_leaves_its_sources_alone(below: dict[str, Any], above: dict[str, Any]) -> None:
    import copy

    before = copy.deepcopy(below), copy.deepcopy(above)
    merged: dict[str, Any] = {}
    merge(merged, below, {}, "below")
    merge(merged, above, {}, "above")
    assert (below, above) == before


@given(tables)
def test_merging_twice_is_merging_once(table: dict[str, Any]) -> None:
    once: dict[str, Any] = {}
    merge(once, table, {}, "a")
    twice: dict[str, Any] = {}
    merge(twice, table, {}, "a")
    merge(twice, table, {}, "b")
    assert once == twice == table


# --- mistakes ---


def test_unknown_key_names_file_line_key_and_nearest(write: Write) -> None:
    path = write(
        "config.d/gpu.toml", '# comment\n[profiles.default]\n\ndefault_memroy = 256\nmemroy = "256MiB"\n'
    )
    error = mistake()
    assert error.brief == f"{path}:4: unknown key profiles.default.default_memroy"
    assert error.details == f"{path}:5: unknown key profiles.default.memroy; did you mean memory?"


def test_unknown_key_alone_has_its_hint(write: Write) -> None:
    path = write("config.toml", "\nacel = 1\n")
    error = mistake()
    assert (error.brief, error.hint) == (f"{path}:2: unknown key acel", "did you mean accel?")
    assert error.details is None


def test_a_key_like_no_other_gets_the_place_of_explanations(write: Write) -> None:
    write("config.toml", "xyzzy = 1\n")
    assert mistake().hint == f"every option is explained in {places.DEFAULT_FILE}"


def test_dedicated_cpus_are_a_list_of_cpus(write: Write) -> None:
    write("config.toml", 'dedicated_cpus = "8-11, 2"\n[profiles.small]\ncpu_policy = "dedicated"\n')
    settings = read_settings().settings
    assert settings.dedicated_cpus == "2,8-11"
    assert [name for name, profile in settings.profiles.items() if profile.has_own_cpus] == ["small"]
    path = write("config.toml", 'dedicated_cpus = "all"\n')
    assert mistake().brief == f"{path}:1: dedicated_cpus: 'all' is not a list of CPUs such as \"2-7,10\""
    path = write("config.toml", '[profiles.small]\ncpu_policy = "static"\n')
    assert f"{path}:2: profiles.small.cpu_policy: 'static' is not one of" in mistake().brief


def test_machines_of_the_pool_have_no_cpus_of_their_own(write: Write) -> None:
    own = '[profiles.small]\ncpu_policy = "dedicated"\n[node.pool]\n'
    path = write("config.toml", f"{own}default = 2\nsmall = 1\n")
    error = mistake()
    assert error.brief.startswith(f"{path}:5: node.pool: profile 'small' has cpu_policy = \"dedicated\"")
    write("config.toml", f"{own}default = 2\nsmall = 0\n")
    assert read_settings().settings.node.pool["default"] == 2


def test_unknown_profile_is_named_with_the_nearest(write: Write) -> None:
    path = write("config.toml", 'default_profile = "smal"\n')
    error = mistake()
    assert error.brief == f"{path}:1: default_profile: no profile 'smal'"
    assert error.hint == "did you mean small?"


def test_what_may_be_waived_is_read(write: Write) -> None:
    assert read_settings().settings.vfio.waive == ()
    write("config.toml", '[vfio]\nwaive = ["acs-off", "boot-display"]\n')
    assert read_settings().settings.vfio.waive == ("acs-off", "boot-display")


def test_a_kind_of_cdi_is_read_and_another_word_named(write: Write) -> None:
    assert read_settings().settings.vfio.cdi_kind == "casemate.dev/device"
    write("config.toml", '[vfio]\ncdi_kind = "nvidia.com/pgpu"\n')
    assert read_settings().settings.vfio.cdi_kind == "nvidia.com/pgpu"
    path = write("config.toml", '[vfio]\ncdi_kind = "pgpu"\n')
    assert mistake().brief.startswith(f"{path}:2: vfio.cdi_kind: 'pgpu' is not a kind of CDI")
    write("config.toml", '[vfio]\ncdi_kind = "nvidia.com/g"\n')  # at which containerd 1.7 panics
    assert "vfio.cdi_kind: 'nvidia.com/g' is not a kind of CDI" in mistake().brief


def test_nvlink_partitions_are_read_with_addresses_as_the_kernel_has_them(write: Write) -> None:
    assert read_settings().settings.vfio.partitions == {}
    write("config.d/a.toml", '[vfio.partitions]\n0 = ["00000000:3B:00.0", "43:00.0"]\n')
    write("config.d/b.toml", '[vfio.partitions]\n"left" = ["10000:01:00.0"]\n')
    assert read_settings().settings.vfio.partitions == {
        "0": ("0000:3b:00.0", "0000:43:00.0"),
        "left": ("10000:01:00.0",),
    }


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('4 = ["3b:00.8"]', "vfio.partitions.4.0: '3b:00.8' is not a PCI address such as 0000:3b:00.0"),
        ('4 = ["3b:00.0", "3b:20.0"]', "vfio.partitions.4.1: '3b:20.0' is not a PCI address"),
        ('4 = ["3b:00.0", "0000:3B:00.0"]', "vfio.partitions.4: 0000:3b:00.0 is in it twice"),
        ("4 = []", "vfio.partitions.4: must name the GPUs of the partition"),
        ('"of four" = ["3b:00.0"]', "vfio.partitions.of four: must be letters, digits,"),
        ("4 = 3", "vfio.partitions.4: input should be a valid list"),
    ],
)
def test_what_is_no_nvlink_partition_is_named(write: Write, line: str, said: str) -> None:
    path = write("config.toml", f"[vfio.partitions]\n{line}\n")
    assert mistake().brief.startswith(f"{path}:2: {said}")


def test_two_nvlink_partitions_of_the_same_devices_are_named(write: Write) -> None:
    write("config.toml", '[vfio.partitions]\na = ["3b:00.0", "43:00.0"]\nb = ["43:00.0", "3b:00.0"]\n')
    assert mistake().brief.endswith(": vfio.partitions: a and b are of the same devices")


def test_a_waiver_of_nothing_is_named_with_the_nearest(write: Write) -> None:
    path = write("config.toml", '[vfio]\nwaive = ["acs-of"]\n')
    error = mistake()
    assert error.brief.startswith(f"{path}:2: vfio.waive.0: 'acs-of' is not one of noiommu, ")
    assert error.hint == "did you mean acs-off?"


def test_what_is_no_matter_of_judgement_cannot_be_waived(write: Write) -> None:
    write("config.toml", '[vfio]\nwaive = ["root-disk"]\n')
    assert "vfio.waive.0: 'root-disk' is not one of" in mistake().brief


def test_unknown_annotation_is_named_with_the_nearest(write: Write) -> None:
    path = write("config.toml", 'allowed_annotations = ["dev.casemate.memry"]\n')
    error = mistake()
    assert error.brief.startswith(f"{path}:1: allowed_annotations.0: 'dev.casemate.memry' is not one of")
    assert error.hint == "did you mean dev.casemate.memory?"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('accel = "kmv"', "accel: 'kmv' is not one of 'auto', 'kvm' or 'tcg'"),
        ('traces_kept = "4"', "traces_kept: input should be a valid integer, not '4'"),
        ("traces_kept = true", "traces_kept: input should be a valid integer, not True"),
        ("traces_kept = -1", "traces_kept: input should be greater than or equal to 0, not -1"),
        ("accel = 1", "accel: 1 is not one of"),
        ('qemu = "qemu"', "qemu: must be an absolute path"),
        ('virtiofsd = "x"', 'virtiofsd: must be an absolute path or "auto"'),
        ('console_size = "1KB"', "console_size: '1KB' may mean powers of 1000"),
        ('console_size = "1K"', "console_size: input should be greater than or equal to 4096"),
        ('qemu_user = "root; x"', "qemu_user: string should match pattern"),
        ("[timeouts]\nboot_s = 0", "timeouts.boot_s: input should be greater than 0"),
        ("[timeouts]\nboot_s = inf", "timeouts.boot_s: input should be a finite number"),
        ("[timeouts]\ntcg_factor = 0.5", "timeouts.tcg_factor: input should be greater than or equal to 1"),
        ("timeouts = 3", "timeouts: input should be"),
        ("profiles = 3", "profiles: input should be a valid dictionary"),
        ("[profiles]\nsmall = 3", "profiles.small: input should be"),
        ("[profiles]\ndefault = 3", "profiles.default: input should be"),
        ("[profiles.small]\nvcpus = 0", "profiles.small.vcpus: must be from 1 to 4096"),
        ("[profiles.small]\nmemory = 1", "profiles.small.memory: must be at least 48MiB"),
        ('[profiles."a b"]\nvcpus = 1', "profiles.a b: must be letters"),
    ],
)
def test_a_wrong_value_is_named_with_its_reason(write: Write, text: str, says: str) -> None:
    path = write("config.toml", text + "\n")
    error = mistake()
    assert error.brief.startswith(f"{path}:")
    assert says in error.brief


def test_a_mistake_that_all_profiles_inherit_is_said_once(write: Write) -> None:
    path = write("config.toml", '[profiles.default]\nmemory = "1KB"\nvcpu = 2\n')
    error = mistake()
    lines = [error.brief, *(error.details or "").splitlines()]
    assert sorted(line.split(": ")[0] for line in lines) == [f"{path}:2", f"{path}:3"]


def test_nearest_of_a_literal(write: Write) -> None:
    write("config.toml", 'accel = "kmv"\n')
    assert mistake().hint == "did you mean kvm?"


def test_broken_toml_names_the_line(write: Write) -> None:
    path = write("config.d/x.toml", 'accel = "kvm"\naccel = \n')
    assert mistake().brief.startswith(f"{path}: not valid TOML: ")
    assert "line 2" in mistake().brief


def test_a_file_that_is_not_text_is_named(host: Path) -> None:
    path = host / "etc/config.toml"
    path.write_bytes(b"accel = \xff")
    assert mistake().brief == f"{path}: not UTF-8 text at byte 8"


def test_a_file_that_cannot_be_read_is_named(host: Path) -> None:
    path = host / "etc/config.d/a.toml"
    path.mkdir()
    assert mistake().brief == f"{path}: cannot be read: Is a directory"


def test_a_directory_that_cannot_be_listed_is_named(host: Path) -> None:
    (host / "etc/config.d").rmdir()
    (host / "etc/config.d").symlink_to("config.d")
    assert "config.d: cannot be read: Too many levels of symbolic links" in mistake().brief


def test_a_config_d_that_is_a_file_or_missing_holds_nothing(host: Path) -> None:
    (host / "etc/config.d").rmdir()
    read_settings()
    (host / "etc/config.d").write_text("")
    read_settings()


def test_deeply_nested_toml_is_a_mistake_not_a_crash(write: Write) -> None:
    path = write("config.toml", "accel = " + "[" * 100_000)
    assert mistake().brief.startswith(f"{path}: not valid TOML")


def test_missing_defaults_say_reinstall(host: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(places, "DEFAULT_FILE", str(host / "default.toml"))
    error = mistake()
    assert error.brief.endswith("default.toml: missing")
    assert error.hint == "reinstall casemate"


def test_defaults_that_lack_a_key_are_a_mistake(host: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = Path(places.DEFAULT_FILE).read_text()
    (host / "default.toml").write_text(text.replace('accel = "auto"', ""))
    monkeypatch.setattr(places, "DEFAULT_FILE", str(host / "default.toml"))
    assert mistake().brief == f"{host}/etc/config.toml: accel is missing"


# --- lines ---


@pytest.mark.parametrize(
    ("text", "path", "line"),
    [
        ("a = 1", ("a",), 1),
        ("\n[t]\na = 1", ("t", "a"), 3),
        ("[t.u]\na = 1", ("t", "u", "a"), 2),
        ("t.u.a = 1", ("t", "u", "a"), 1),
        ("[t]\nu.a = 1", ("t", "u", "a"), 2),
        ('["t x"]\n"a.b" = 1', ("t x", "a.b"), 2),
        ("['t']\n'a' = 1", ("t",), 1),
        ("[t] # why\na = 1", ("t",), 1),
        ("a = 1", ("b",), None),
        ('a = """\nb = 1\n"""\nb = 2', ("b",), None),  # two lines look like it: none is claimed
        ("t = { a = 1 }", ("t", "a"), None),
    ],
)
def test_line_of_is_right_or_silent(text: str, path: tuple[str, ...], line: int | None) -> None:
    assert line_of(text, path) == line


def test_known_keys_are_the_schemas() -> None:
    assert "accel" in known_keys(())
    assert "boot_s" in known_keys(("timeouts",))
    assert "vcpus" in known_keys(("profiles", "any"))
    assert known_keys(("profiles",)) == []
