"""The ledger's records as rows, within a transaction that is the caller's. It decides nothing."""

import json
import sqlite3
from collections.abc import Iterator

from rpc.errors import NotFound
from vfio.address import PciAddress
from vfio.ledger.allotment import Allotment, Spoken
from vfio.ledger.choice import Choice
from vfio.ledger.records import (
    Binding,
    Cause,
    Claim,
    Device,
    Entry,
    Instant,
    Pod,
    Process,
    State,
    Use,
)

Connection = sqlite3.Connection


def insert_claim(
    connection: Connection,
    now: Instant,
    pod: Pod,
    owner: Process,
    choice: Choice,
    allotment: Allotment,
    page_bytes: int,
) -> int:
    """The claim's number. Its uses begin; the states of its devices are another matter."""
    cursor = connection.execute(
        "INSERT INTO claims (namespace, pod, tenant, pid, started, boot, partitions, page_bytes, made_s)"
        " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
        (
            *(pod.namespace, pod.id, pod.tenant),
            *(owner.pid, owner.started, owner.boot),
            *(json.dumps(choice.partitions), page_bytes, now.wall_s),
        ),
    )
    made = cursor.lastrowid
    assert made is not None
    uses: list[tuple[PciAddress, int | None]] = [
        (candidate.address, request) for request, group in enumerate(choice.given) for candidate in group
    ]
    uses += [(address, None) for address in sorted(choice.companions)]
    connection.executemany(
        "INSERT INTO uses (claim, address, request, from_s, from_uptime_s, boot) VALUES (?, ?, ?, ?, ?, ?)",
        [(made, str(address), request, now.wall_s, now.uptime_s, now.boot) for address, request in uses],
    )
    connection.executemany(
        "INSERT INTO cpus (cpu, node, claim) VALUES (?, ?, ?)",
        [(cpu, node, made) for node, cpus in allotment.cpus.items() for cpu in cpus],
    )
    connection.executemany(
        "INSERT INTO pages (claim, node, size_bytes, count) VALUES (?, ?, ?, ?)",
        [(made, node, page_bytes, count) for node, count in allotment.pages.items()],
    )
    return made


def end_claim(connection: Connection, now: Instant, claim: int) -> None:
    """Its uses end, its CPUs and pages are nobody's.

    If the host was booted meanwhile, a use has ended with the last that was written down before.
    """
    for use in connection.execute(
        "SELECT address, from_uptime_s, boot FROM uses WHERE claim = ? AND seconds IS NULL", (claim,)
    ).fetchall():
        seconds = _seconds(connection, now, use)
        connection.execute(
            "UPDATE uses SET seconds = ?, to_s = from_s + ? WHERE claim = ? AND address = ?",
            (seconds, seconds, claim, use["address"]),
        )
    connection.execute("DELETE FROM cpus WHERE claim = ?", (claim,))
    connection.execute("DELETE FROM pages WHERE claim = ?", (claim,))
    connection.execute("UPDATE claims SET ended_s = ? WHERE id = ?", (now.wall_s, claim))


def _seconds(connection: Connection, now: Instant, use: sqlite3.Row) -> float:
    """Of an earlier boot nobody knows more than when the ledger was last written to (Ledger.still_held)."""
    until = now.uptime_s
    if use["boot"] != now.boot:
        (until,) = connection.execute(
            "SELECT max(uptime_s) FROM (SELECT uptime_s FROM act WHERE boot = :boot"
            " UNION ALL SELECT max(uptime_s) FROM audit WHERE boot = :boot)",
            {"boot": use["boot"]},
        ).fetchone()
    return max(float(until or 0.0) - float(use["from_uptime_s"]), 0.0)


def set_state(
    connection: Connection,
    now: Instant,
    address: PciAddress,
    state: State,
    *,
    claim: int | None = None,
    worker: Process | None = None,
    reason: str = "",
) -> None:
    """The triggers see to what may follow upon what, and to the audit log."""
    values = (
        state.value,
        claim,
        reason,
        now.wall_s,
        *((worker.pid, worker.started, worker.boot) if worker else (None, None, None)),
        str(address),
    )
    changed = connection.execute(
        "UPDATE devices SET state = ?, claim = ?, reason = ?, since_s = ?,"
        " worker_pid = ?, worker_started = ?, worker_boot = ? WHERE address = ?",
        values,
    ).rowcount
    if not changed:
        connection.execute(
            "INSERT INTO devices"
            " (state, claim, reason, since_s, worker_pid, worker_started, worker_boot, address)"
            " VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
            values,
        )


def set_worker(connection: Connection, address: PciAddress, worker: Process) -> None:
    connection.execute(
        "UPDATE devices SET worker_pid = ?, worker_started = ?, worker_boot = ? WHERE address = ?",
        (worker.pid, worker.started, worker.boot, str(address)),
    )


def note(
    connection: Connection,
    cause: Cause,
    *,
    address: PciAddress | None = None,
    claim: int | None = None,
    detail: str = "",
) -> None:
    connection.execute(
        "INSERT INTO audit (at_s, uptime_s, boot, actor, cause, address, claim, detail)"
        " SELECT wall_s, uptime_s, boot, actor, ?, ?, ?, ? FROM act",
        (cause.value, str(address) if address else None, claim, detail),
    )


# --- devices ---


def devices(connection: Connection) -> list[Device]:
    found = connection.execute(
        "SELECT * FROM devices LEFT JOIN claims ON claims.id = devices.claim"
    ).fetchall()
    return sorted((_device(row) for row in found), key=lambda device: device.address)


def device(connection: Connection, address: PciAddress) -> Device:
    """One that nothing is written down of is free, and always was."""
    row = connection.execute(
        "SELECT * FROM devices LEFT JOIN claims ON claims.id = devices.claim WHERE address = ?",
        (str(address),),
    ).fetchone()
    return Device(address, State.FREE, 0.0) if row is None else _device(row)


def _device(row: sqlite3.Row) -> Device:
    return Device(
        PciAddress.parse(row["address"]),
        State(row["state"]),
        row["since_s"],
        row["reason"],
        row["claim"],
        _pod(row) if row["claim"] is not None else None,
    )


def _pod(row: sqlite3.Row) -> Pod:
    return Pod(row["namespace"], row["pod"], row["tenant"])


def resets(connection: Connection) -> list[tuple[PciAddress, Process]]:
    """What is being reset, and by whom."""
    found = connection.execute("SELECT * FROM devices WHERE state = 'resetting'").fetchall()
    return [
        (
            PciAddress.parse(row["address"]),
            Process(row["worker_pid"], row["worker_started"], row["worker_boot"]),
        )
        for row in found
    ]


def resetting(connection: Connection, claim: int, worker: Process) -> tuple[PciAddress, ...]:
    """What this worker is to reset of a claim."""
    own = {address for address, working in resets(connection) if working == worker}
    return tuple(sorted(own.intersection(addresses_of(connection, claim))))


# --- claims ---


def addresses_of(connection: Connection, claim: int) -> list[PciAddress]:
    """The devices that are this claim's now, or that nobody has reset since."""
    found = connection.execute("SELECT address FROM devices WHERE claim = ?", (claim,)).fetchall()
    return sorted(PciAddress.parse(row["address"]) for row in found)


def claim_of(connection: Connection, pod: Pod) -> int | None:
    """The number of the claim that a pod holds."""
    row = connection.execute(
        "SELECT id FROM claims WHERE ended_s IS NULL AND namespace = ? AND pod = ?", (pod.namespace, pod.id)
    ).fetchone()
    return None if row is None else int(row["id"])


def claim(connection: Connection, number: int) -> Claim:
    """Raises NotFound."""
    row = connection.execute("SELECT * FROM claims WHERE id = ?", (number,)).fetchone()
    if row is None:
        raise NotFound(f"no claim {number}")
    return _claim(connection, row)


def claims(connection: Connection) -> list[Claim]:
    """Those that hold."""
    found = connection.execute("SELECT * FROM claims WHERE ended_s IS NULL ORDER BY id").fetchall()
    return [_claim(connection, row) for row in found]


def _claim(connection: Connection, row: sqlite3.Row) -> Claim:
    number = row["id"]
    given: dict[int, list[PciAddress]] = {}
    companions: list[PciAddress] = []
    for use in connection.execute("SELECT address, request FROM uses WHERE claim = ?", (number,)):
        address = PciAddress.parse(use["address"])
        (companions if use["request"] is None else given.setdefault(use["request"], [])).append(address)
    cpus: dict[int, list[int]] = {}
    for found in connection.execute("SELECT node, cpu FROM cpus WHERE claim = ? ORDER BY cpu", (number,)):
        cpus.setdefault(found["node"], []).append(found["cpu"])
    pages = connection.execute("SELECT node, count FROM pages WHERE claim = ?", (number,)).fetchall()
    return Claim(
        id=number,
        pod=_pod(row),
        owner=Process(row["pid"], row["started"], row["boot"]),
        made_s=row["made_s"],
        ended_s=row["ended_s"],
        given=tuple(tuple(sorted(given[request])) for request in sorted(given)),
        companions=tuple(sorted(companions)),
        partitions=tuple(json.loads(row["partitions"])),
        cpus={node: tuple(numbers) for node, numbers in cpus.items()},
        pages={found["node"]: found["count"] for found in pages},
        page_bytes=row["page_bytes"],
    )


def any_holds(connection: Connection) -> bool:
    """Whether any claim does."""
    return connection.execute("SELECT 1 FROM claims WHERE ended_s IS NULL").fetchone() is not None


def owners(connection: Connection) -> Iterator[Process]:
    """Of the claims that hold."""
    for row in connection.execute(
        "SELECT DISTINCT pid, started, boot FROM claims WHERE ended_s IS NULL"
    ).fetchall():
        yield Process(row["pid"], row["started"], row["boot"])


def workers(connection: Connection) -> Iterator[Process]:
    for _, working in resets(connection):
        yield working


def spoken(connection: Connection) -> Spoken:
    """CPUs and pages of all claims."""
    cpus = frozenset(row["cpu"] for row in connection.execute("SELECT cpu FROM cpus"))
    pages = connection.execute(
        "SELECT node, size_bytes, sum(count) AS all_ FROM pages GROUP BY node, size_bytes"
    )
    return Spoken(cpus, {(row["node"], row["size_bytes"]): row["all_"] for row in pages})


# --- bindings ---


def bindings(connection: Connection) -> list[Binding]:
    found = [_binding(row) for row in connection.execute("SELECT * FROM bindings").fetchall()]
    return sorted(found, key=lambda binding: binding.address)


def binding(connection: Connection, address: PciAddress) -> Binding | None:
    row = connection.execute("SELECT * FROM bindings WHERE address = ?", (str(address),)).fetchone()
    return None if row is None else _binding(row)


def _binding(row: sqlite3.Row) -> Binding:
    return Binding(
        PciAddress.parse(row["address"]),
        row["claim"],
        row["driver"],
        row["override"],
        row["condition"],
        row["boot"],
        bool(row["used"]),
        bool(row["clean"]),
    )


def insert_binding(connection: Connection, now: Instant, claim: int, binding: Binding) -> None:
    connection.execute(
        "INSERT INTO bindings (address, claim, driver, override, condition, boot) VALUES (?, ?, ?, ?, ?, ?)",
        (str(binding.address), claim, binding.driver, binding.override, binding.condition, now.boot),
    )


def mark_used(connection: Connection, claim: int) -> None:
    connection.execute("UPDATE bindings SET used = 1, clean = 0 WHERE claim = ?", (claim,))


def mark_clean(connection: Connection, address: PciAddress) -> None:
    connection.execute("UPDATE bindings SET clean = 1 WHERE address = ?", (str(address),))


def delete_binding(connection: Connection, address: PciAddress) -> None:
    connection.execute("DELETE FROM bindings WHERE address = ?", (str(address),))


# --- what was ---


def uses(connection: Connection, now: Instant, since_s: float) -> list[Use]:
    found = connection.execute(
        "SELECT uses.*, namespace, pod, tenant FROM uses JOIN claims ON claims.id = uses.claim"
        " WHERE to_s IS NULL OR to_s >= ? ORDER BY from_s, claim, uses.address",
        (since_s,),
    ).fetchall()
    return [
        Use(
            pod=_pod(row),
            address=PciAddress.parse(row["address"]),
            companion=row["request"] is None,
            from_s=row["from_s"],
            to_s=row["to_s"],
            seconds=row["seconds"] if row["seconds"] is not None else _seconds(connection, now, row),
        )
        for row in found
    ]


def entries(connection: Connection, address: PciAddress | None, after: int, most: int) -> list[Entry]:
    about = "" if address is None else "AND address = :address"
    found = connection.execute(
        "SELECT audit.*, namespace, pod, tenant FROM audit LEFT JOIN claims ON claims.id = audit.claim"
        f" WHERE number > :after {about} ORDER BY number DESC LIMIT :most",
        {"after": after, "address": str(address), "most": most},
    ).fetchall()
    return [_entry(row) for row in reversed(found)]


def _entry(row: sqlite3.Row) -> Entry:
    return Entry(
        number=row["number"],
        at_s=row["at_s"],
        cause=Cause(row["cause"]),
        actor=row["actor"],
        address=PciAddress.parse(row["address"]) if row["address"] else None,
        claim=row["claim"],
        pod=_pod(row) if row["namespace"] is not None else None,
        before=State(row["before"]) if row["before"] else None,
        after=State(row["after"]) if row["after"] else None,
        detail=row["detail"],
    )
