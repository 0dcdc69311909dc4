"""A bundle's config.json: an object of JSON, or an error that names the file."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rpc.errors import InvalidArgument
from shim.bundle import is_containers, read_config


def test_an_object_is_read_as_it_stands(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"hostname": "wéb", "x": [1, null]}')
    assert read_config(str(tmp_path)) == {"hostname": "wéb", "x": [1, None]}


def test_none_is_no_error(tmp_path: Path) -> None:
    assert read_config(str(tmp_path)) is None


@pytest.mark.parametrize("data", [b"", b"{", b"\xff\xfe{}", b'{"a": "\xff"}', b"[" * 100_000])
def test_what_is_not_json_is_named(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "config.json").write_bytes(data)
    with pytest.raises(InvalidArgument, match=r"config\.json is not JSON"):
        read_config(str(tmp_path))


@pytest.mark.parametrize("text", ["[]", "null", "17", '"x"'])
def test_what_is_no_object_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(InvalidArgument, match=r"config\.json is not a JSON object"):
        read_config(str(tmp_path))


@given(data=st.binary(max_size=60))
def test_any_bytes_are_read_or_refused(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    bundle = tmp_path_factory.mktemp("bundle")
    (bundle / "config.json").write_bytes(data)
    try:
        assert isinstance(read_config(str(bundle)), dict)
    except InvalidArgument:
        return


@pytest.mark.parametrize(
    ("document", "containers"),
    [(None, False), ({}, False), ({"annotations": {"a": "b"}}, False), ({"process": {"args": ["sh"]}}, True)],
)
def test_a_containers_has_a_process(document: dict[str, object] | None, containers: bool) -> None:
    assert is_containers(document) is containers
