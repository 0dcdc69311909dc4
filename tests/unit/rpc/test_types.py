"""What the shared messages know beyond their fields."""

import pytest

from rpc.api.events import TOPICS, TaskExit
from rpc.api.types import Any, Timestamp


@pytest.mark.parametrize("ns", [0, 1, 999_999_999, 1_795_226_645_123_456_789, -1, -1_000_000_000])
def test_a_timestamp_is_a_number_of_nanoseconds(ns: int) -> None:
    stamp = Timestamp.from_ns(ns)
    assert 0 <= stamp.nanos < 1_000_000_000
    assert Timestamp.decode(stamp.encode()).ns == ns


def test_an_any_has_the_bare_name_of_its_content() -> None:
    event = TaskExit(container_id="c", exit_status=42)
    packed = Any.pack(event)
    assert packed.type_url == "containerd.events.TaskExit"
    assert TaskExit.decode(packed.value) == event


def test_every_event_has_its_topic() -> None:
    assert TOPICS[TaskExit] == "/tasks/exit"
    assert len(set(TOPICS.values())) == len(TOPICS) == 9
