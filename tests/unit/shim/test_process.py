"""Every move of every state: legal ones lead where they should, illegal ones are FailedPrecondition."""

import pytest

from rpc.api.task import Status
from rpc.errors import FailedPrecondition
from shim.process import KILLED, Created, Paused, Running, State, Stopped

ENDED = Stopped(3, 1_000)
STATES = (Created(), Running(), Paused(), ENDED)
MOVES = ("start", "pause", "resume", "exec", "delete")

# (state, move) -> the state after it, or None where a move only has to be allowed.
LEGAL: dict[tuple[type[State], str], State | None] = {
    (Created, "start"): Running(),
    (Created, "delete"): None,
    (Running, "pause"): Paused(),
    (Running, "exec"): None,
    (Paused, "resume"): Running(),
    (Stopped, "delete"): None,
}


@pytest.mark.parametrize("move", MOVES)
@pytest.mark.parametrize("state", STATES, ids=lambda state: state.name)
def test_a_move_is_legal_or_named_in_the_error(state: State, move: str) -> None:
    if (type(state), move) in LEGAL:
        assert getattr(state, move)() == LEGAL[type(state), move]
    else:
        with pytest.raises(FailedPrecondition, match=rf"cannot {move} a \w+ that is {state.name}|exec in"):
            getattr(state, move)()


@pytest.mark.parametrize("state", [Created(), Running(), Paused()], ids=lambda state: state.name)
def test_every_living_state_can_exit(state: State) -> None:
    assert state.exit(42, 7) == Stopped(42, 7)


def test_the_first_end_counts() -> None:
    assert ENDED.exit(KILLED, 2_000) is ENDED


def test_a_state_of_no_kind_allows_nothing_but_its_end() -> None:
    for move in MOVES:
        with pytest.raises(FailedPrecondition, match="unknown"):
            getattr(State(), move)()
    assert State().exit(1, 2) == Stopped(1, 2)


def test_states_are_told_to_containerd_by_its_own_numbers() -> None:
    assert [state.status for state in (State(), *STATES)] == [
        Status.UNKNOWN,
        Status.CREATED,
        Status.RUNNING,
        Status.PAUSED,
        Status.STOPPED,
    ]
