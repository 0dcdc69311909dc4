"""Where programs are looked for."""

from pathlib import Path

import pytest

from config import programs
from config.sources import read_defaults
from rpc.errors import NotFound


def test_a_configured_program_is_the_only_candidate(tmp_path: Path) -> None:
    there = tmp_path / "virtiofsd"
    there.write_text("")
    settings = read_defaults().settings.replace(virtiofsd=str(there), qemu=str(there), firmware=str(there))
    assert (
        programs.virtiofsd(settings) == programs.qemu(settings) == programs.firmware(settings) == str(there)
    )
    there.unlink()
    with pytest.raises(NotFound, match=str(there)) as caught:
        programs.virtiofsd(settings)
    assert "/usr/lib/qemu" not in caught.value.brief


def test_auto_takes_the_first_usual_place_that_has_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    monkeypatch.setattr(programs, "VIRTIOFSD_PLACES", (str(first), str(second)))
    settings = read_defaults().settings
    with pytest.raises(NotFound, match=r"first or .*second") as caught:
        programs.virtiofsd(settings)
    assert caught.value.hint == "apt-get install virtiofsd"
    second.write_text("")
    assert programs.virtiofsd(settings) == str(second)
    first.write_text("")
    assert programs.virtiofsd(settings) == str(first)


def test_a_guest_of_several_root_buses_has_a_firmware_that_sets_them_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    qboot, seabios = tmp_path / "qboot", tmp_path / "seabios"
    for name, path in (("QBOOT_PLACES", qboot), ("SEABIOS_PLACES", seabios)):
        monkeypatch.setattr(programs, name, (str(path),))
    settings = read_defaults().settings
    qboot.write_text("")
    assert programs.firmware(settings) == str(qboot)
    with pytest.raises(NotFound, match="SeaBIOS is not at"):
        programs.firmware(settings, several_roots=True)
    seabios.write_text("")
    assert programs.firmware(settings, several_roots=True) == str(seabios)
    own = settings.replace(firmware=str(qboot))
    assert programs.firmware(own, several_roots=True) == str(qboot)
