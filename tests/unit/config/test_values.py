"""Single values: sizes above all, since a wrong one is a pod with a wrong machine."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from config import values

POWERS = {"": 0, "K": 1, "M": 2, "G": 3, "T": 4}


@pytest.mark.parametrize(
    ("text", "size_bytes"),
    [
        ("256MiB", 256 << 20),
        ("256Mi", 256 << 20),
        ("256M", 256 << 20),
        ("256 MiB", 256 << 20),
        (" 2G ", 2 << 30),
        ("1.5GiB", 3 << 29),
        ("0.5KiB", 512),
        ("1TiB", 1 << 40),
        ("4096", 4096),
        ("4096B", 4096),
        (4096, 4096),
        (0, 0),
    ],
)
def test_size_reads_what_people_write(text: object, size_bytes: int) -> None:
    assert values.size(text) == size_bytes


@pytest.mark.parametrize(
    "text",
    [
        "",
        "MiB",
        "-1MiB",
        "1e3",
        "1 2MiB",
        "256mib",
        "0x10",
        "1_000",
        "\N{FULLWIDTH DIGIT ONE}MiB",
        "1.MiB",
        "1PiB",
        "1iB",
        "9" * 30,
        "1MiB\x00",
        True,
        None,
        1.5,
        -1,
        [],
    ],
)
def test_size_refuses_what_is_none(text: object) -> None:
    with pytest.raises(ValueError):
        values.size(text)


def test_size_refuses_what_half_the_world_means_otherwise() -> None:
    with pytest.raises(ValueError, match='write "256MiB"'):
        values.size("256MB")


def test_size_refuses_a_part_of_a_byte() -> None:
    with pytest.raises(ValueError, match="whole number of bytes"):
        values.size("0.3KiB")


@given(
    st.integers(0, 10**15), st.sampled_from(sorted(POWERS)), st.sampled_from(["", "i", "iB"]), st.booleans()
)
def test_size_is_number_times_power_of_1024(number: int, unit: str, tail: str, space: bool) -> None:
    text = f"{number}{' ' if space else ''}{unit}{tail if unit else ''}"
    assert values.size(text) == number * 1024 ** POWERS[unit]


@given(st.integers(0, 1 << 50))
def test_size_of_bytes_written_in_any_way_is_the_same(number: int) -> None:
    assert values.size(number) == values.size(str(number)) == values.size(f"{number}B") == number


@given(st.text(max_size=30))
def test_size_of_any_text_is_a_size_or_a_value_error(text: str) -> None:
    try:
        result = values.size(text)
    except ValueError:
        return
    assert result >= 0


@pytest.mark.parametrize(
    ("text", "match"), [("47MiB", "at least"), ("256.5MiB", "whole number of MiB"), (0, "least")]
)
def test_memory_refuses_what_no_guest_boots_with(text: object, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        values.memory(text)


def test_limits_themselves_are_allowed() -> None:
    assert values.memory("48MiB") == 48 << 20
    assert (values.vcpus(1), values.vcpus(4096)) == (1, 4096)
    assert len(values.kernel_cmdline("x" * 1024)) == 1024


@pytest.mark.parametrize("count", [0, -1, 4097])
def test_vcpus_are_what_qemu_takes(count: int) -> None:
    with pytest.raises(ValueError, match="from 1 to"):
        values.vcpus(count)


@pytest.mark.parametrize("name", ["default", "trixie-6.12", "sha256:" + "0" * 64, "0a1b2c"])
def test_image_takes_names_and_digests(name: str) -> None:
    assert values.image(name) == name


@pytest.mark.parametrize("name", ["", "../../etc", "a/b", ".", "-x", "a b", "a\n", "x" * 129, "ä"])
def test_image_refuses_what_could_be_a_path(name: str) -> None:
    with pytest.raises(ValueError):
        values.image(name)


@pytest.mark.parametrize("text", ["", "quiet loglevel=3", 'dyndbg="file x +p"'])
def test_kernel_cmdline_takes_parameters(text: str) -> None:
    assert values.kernel_cmdline(text) == text


@pytest.mark.parametrize(
    "text", ["a\nb", "\x00", "ü", "x" * 1025, "casemate.port=1", "quiet casemate.transport=serial"]
)
def test_kernel_cmdline_refuses_what_is_not_one_line_or_ours(text: str) -> None:
    with pytest.raises(ValueError):
        values.kernel_cmdline(text)


@pytest.mark.parametrize("path", ["qemu", "./qemu", "", "/a\nb", "/a\0b"])
def test_paths_are_absolute(path: str) -> None:
    with pytest.raises(ValueError, match="absolute path"):
        values.absolute_path(path)
    with pytest.raises(ValueError, match='or "auto"'):
        values.absolute_path_or_auto(path)


def test_auto_is_a_path_only_where_it_may_be() -> None:
    assert values.absolute_path_or_auto("auto") == "auto"
    assert values.absolute_path_or_auto("/usr/bin/x") == "/usr/bin/x"
    with pytest.raises(ValueError):
        values.absolute_path("auto")


@pytest.mark.parametrize("name", ["", "a b", "-a", "a/b", "x" * 64])
def test_profile_names_are_plain(name: str) -> None:
    with pytest.raises(ValueError):
        values.profile_name(name)


@pytest.mark.parametrize("name", ["", "a b", "max\n"])
def test_cpu_models_are_plain(name: str) -> None:
    with pytest.raises(ValueError):
        values.cpu_model(name)
