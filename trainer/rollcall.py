"""The roll call: who is missing, and in what ranks differ that should not, judged from their records."""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

from trainer import exits

MAX_LINES = 12
"""Differences, and hosts in one line, that are told: of hundreds, the first few are enough."""


@dataclass(frozen=True)
class Record:
    """What a rank says of itself."""

    rank: int
    size: int
    host: str
    local_rank: int
    local_size: int
    device: str
    interface: str
    address: str
    facts: dict[str, str]
    problem: str | None  # what it has met already
    code: int  # and the exit code for that


@dataclass(frozen=True)
class Verdict:
    """What is found, the same for all ranks."""

    code: int
    """``exits.DONE``, or what all end with."""
    message: str
    outside: str
    """An address at which other hosts reach one of them; empty when all are loopback addresses."""
    table: str
    """Hosts, their ranks, interfaces and addresses, a line for each."""


def missing(came: list[Record], limit_s: float) -> Verdict:
    """Return the verdict when not all ranks have come in time; ``came`` holds rank 0 at least."""
    size = came[0].size
    absent = set(range(size)) - {record.rank for record in came}
    return Verdict(
        exits.LOST,
        f"{len(came)} of {size} ranks came within timeouts.start_s={limit_s:g} s; missing: ranks "
        f"{_spans(absent)}. Those that came:\n{_table(came)}\nSee that the launcher started every host (its "
        "hostfile, --nnodes and --node_rank, ssh to each of them), and the messages of the hosts that are "
        "missing: a process that ended, or that cannot reach MASTER_ADDR and MASTER_PORT, says so itself",
        "",
        "",
    )


def judge(records: list[Record]) -> Verdict:
    """Return the verdict on all ranks' records, in the ranks' order."""
    table = _table(records)
    outside = next(
        (record.address for record in records if not record.address.startswith(("127.", "::1"))), ""
    )
    met = [(record.problem, record) for record in records if record.problem is not None]
    if met:
        code = max((record.code for _, record in met), key=lambda code: code == exits.WRONG)
        if len({problem for problem, _ in met}) == 1 and len(met) == len(records):
            return Verdict(code, str(met[0][0]), outside, table)
        lines = [f"{text}\n  (met by {_where(who)})" for text, who in _grouped(met)]
        return Verdict(code, "\n".join(lines[:MAX_LINES]), outside, table)
    differences = _differences(records)
    if not differences:
        return Verdict(exits.DONE, "", outside, table)
    more = len(differences) - MAX_LINES
    lines = differences[:MAX_LINES] + ([f"and {more} more"] if more > 0 else [])
    listed = "".join(f"\n  - {line}" for line in lines)
    return Verdict(
        exits.WRONG,
        f"ranks differ in what must be equal:{listed}\nGive every host the same code, "
        "packages, config and data",
        outside,
        table,
    )


def _differences(records: list[Record]) -> list[str]:
    found = []
    counts: dict[int, list[int]] = {record.local_size: [0] * record.local_size for record in records}
    for record in records:
        counts[record.local_size][record.local_rank] += 1
    for size, by_local_rank in counts.items():
        if len(set(by_local_rank)) > 1:
            found.append(
                f"ranks per host do not add up: of hosts with {size} ranks, local ranks 0 to {size - 1} came "
                f"{', '.join(map(str, by_local_rank))} times; start the same launcher on every host"
            )
    names = {name: None for record in records for name in record.facts}
    columns = {"device": [(record.device, record) for record in records]}
    columns |= {name: [(record.facts.get(name, "none"), record) for record in records] for name in names}
    for name, column in columns.items():
        if len({value for value, _ in column}) > 1:
            values = (f"{_where(who, ranks=False)} {value}" for value, who in _grouped(column))
            found.append(f"{name}: {'; '.join(values)}")
    return found


def _grouped(column: Iterable[tuple[str, Record]]) -> list[tuple[str, list[Record]]]:
    groups: dict[str, list[Record]] = defaultdict(list)
    for value, record in column:
        groups[value].append(record)
    return list(groups.items())


def _where(records: list[Record], ranks: bool = True) -> str:
    """Name hosts, and which of their ranks: ``node1 (ranks 0-3), node2 (rank 4)``."""
    hosts = [
        host + (f" (rank{'s' * (len(of) > 1)} {_spans(r.rank for r in of)})" if ranks else "")
        for host, of in _grouped((record.host, record) for record in records)
    ]
    more = [f"and {len(hosts) - MAX_LINES} more"] if len(hosts) > MAX_LINES else []
    return ", ".join(hosts[:MAX_LINES] + more)


def _table(records: list[Record]) -> str:
    groups = _grouped((f"{record.interface} {record.address}", record) for record in records)
    lines = [f"  {_where(who)}: {at}" for at, who in groups]
    more = [f"  and {len(lines) - MAX_LINES} more"] if len(lines) > MAX_LINES else []
    return "\n".join(lines[:MAX_LINES] + more)


def _spans(ranks: Iterable[int]) -> str:
    """Name ranks in short: ``0-3, 5``."""
    spans: list[list[int]] = []
    for rank in sorted(ranks):
        if spans and spans[-1][1] == rank - 1:
            spans[-1][1] = rank
        else:
            spans.append([rank, rank])
    return ", ".join(str(low) if low == high else f"{low}-{high}" for low, high in spans)
