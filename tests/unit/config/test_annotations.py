"""What a pod's annotations may change, and that nothing else gets through."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from config import annotations
from config.annotations import KNOWN, apply
from config.settings import Profile, Settings
from config.sources import read_defaults
from rpc.errors import CasemateError, InvalidArgument, PermissionDenied


@pytest.fixture(scope="module")
def settings() -> Settings:
    """Everything allowed."""
    return read_defaults().settings.replace(allowed_annotations=KNOWN)


@pytest.fixture(scope="module")
def default(settings: Settings) -> Profile:
    return settings.profiles["default"]


def test_no_annotation_changes_nothing(settings: Settings, default: Profile) -> None:
    assert apply(settings, default, {}) == default
    assert apply(settings, default, {"io.kubernetes.cri.sandbox-id": "x", "dev.other.vcpus": "9"}) == default


def test_each_annotation_changes_its_own_field(settings: Settings, default: Profile) -> None:
    assert apply(settings, default, {annotations.VCPUS: "3"}) == default.replace(vcpus=3)
    assert apply(settings, default, {annotations.MEMORY: "1GiB"}) == default.replace(memory_bytes=1 << 30)
    assert apply(settings, default, {annotations.IMAGE: "other"}) == default.replace(image="other")
    assert apply(settings, default, {annotations.PROFILE: "large"}) == settings.profiles["large"]
    assert apply(settings, default, {annotations.KERNEL_CMDLINE: "debug"}).kernel_cmdline == "debug"
    own = apply(settings, default, {annotations.CPU_POLICY: "dedicated"})
    assert own == default.replace(cpu_policy="dedicated")
    assert (own.has_own_cpus, default.has_own_cpus) == (True, False)


def test_a_profile_comes_first_whatever_the_order(settings: Settings, default: Profile) -> None:
    asked = {annotations.VCPUS: "3", annotations.PROFILE: "large"}
    assert apply(settings, default, asked) == settings.profiles["large"].replace(vcpus=3)


def test_kernel_parameters_come_after_the_profiles(settings: Settings, default: Profile) -> None:
    profile = default.replace(kernel_cmdline="quiet")
    assert apply(settings, profile, {annotations.KERNEL_CMDLINE: "debug"}).kernel_cmdline == "quiet debug"


def test_kernel_parameters_together_have_a_limit(settings: Settings, default: Profile) -> None:
    profile = default.replace(kernel_cmdline="x" * 600)
    with pytest.raises(InvalidArgument, match="kernel-cmdline: must not be longer"):
        apply(settings, profile, {annotations.KERNEL_CMDLINE: "y" * 600})


@pytest.mark.parametrize("name", KNOWN)
def test_what_the_operator_does_not_allow_is_denied_and_named(
    settings: Settings, default: Profile, name: str
) -> None:
    strict = settings.replace(allowed_annotations=tuple(each for each in KNOWN if each != name))
    with pytest.raises(PermissionDenied, match=name) as caught:
        apply(strict, default, {name: "whatever"})
    assert name in (caught.value.hint or "")


def test_by_default_only_a_profile_may_be_chosen() -> None:
    assert read_defaults().settings.allowed_annotations == (annotations.PROFILE,)


def test_unknown_annotation_is_an_error_with_the_nearest(settings: Settings, default: Profile) -> None:
    with pytest.raises(InvalidArgument, match=r"dev\.casemate\.vcpu' is unknown") as caught:
        apply(settings, default, {"dev.casemate.vcpu": "1"})
    assert caught.value.hint == "did you mean dev.casemate.vcpus?"
    with pytest.raises(InvalidArgument) as caught:
        apply(settings, default, {"dev.casemate.": "1"})
    assert caught.value.hint


def test_devices_are_no_matter_of_the_profile(settings: Settings, default: Profile) -> None:
    assert apply(settings, default, {annotations.DEVICES: "0000:3b:00.0"}) == default
    with pytest.raises(InvalidArgument, match=r"dev\.casemate/device' is unknown") as caught:
        apply(settings, default, {"dev.casemate/device": "0000:3b:00.0"})
    assert caught.value.hint == "did you mean dev.casemate/devices?"


def test_unknown_profile_is_an_error_with_the_nearest(settings: Settings, default: Profile) -> None:
    with pytest.raises(InvalidArgument, match="no profile 'larg'") as caught:
        apply(settings, default, {annotations.PROFILE: "larg"})
    assert caught.value.hint == "did you mean large?"
    with pytest.raises(InvalidArgument) as caught:
        apply(settings, default, {annotations.PROFILE: "zzz"})
    assert caught.value.hint == "known are default, large, small"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        (annotations.VCPUS, "0"),
        (annotations.VCPUS, "-1"),
        (annotations.VCPUS, "1.5"),
        (annotations.VCPUS, " 1"),
        (annotations.VCPUS, "٣"),
        (annotations.VCPUS, ""),
        (annotations.VCPUS, "9" * 5000),
        (annotations.MEMORY, "1"),
        (annotations.MEMORY, "1GB"),
        (annotations.MEMORY, "lots"),
        (annotations.IMAGE, "../../etc/passwd"),
        (annotations.IMAGE, ""),
        (annotations.KERNEL_CMDLINE, "a\nb"),
        (annotations.KERNEL_CMDLINE, "casemate.port=1"),
    ],
)
def test_a_malformed_value_is_an_error_that_names_the_annotation(
    settings: Settings, default: Profile, name: str, value: str
) -> None:
    with pytest.raises(InvalidArgument, match=f"annotation {name}: ") as caught:
        apply(settings, default, {name: value})
    assert len(str(caught.value)) < 500  # a hostile value does not flood the log


@given(
    st.dictionaries(
        st.sampled_from([*KNOWN, "dev.casemate.x", "other"]) | st.text(max_size=20),
        st.text(max_size=40),
        max_size=5,
    )
)
def test_whatever_is_asked_gives_a_sound_profile_or_our_error(asked: dict[str, str]) -> None:
    settings = read_defaults().settings.replace(allowed_annotations=KNOWN)
    try:
        profile = apply(settings, settings.profiles["default"], asked)
    except CasemateError:
        return
    assert 1 <= profile.vcpus <= 4096
    assert profile.memory_bytes >= 48 << 20
    assert "/" not in profile.image
    assert "\n" not in profile.kernel_cmdline
