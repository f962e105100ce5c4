"""What a Redis must be for an update log: new enough, one whole server, and set to lose nothing.

Must not know what is kept there.
"""

from __future__ import annotations

from weighting_contract.errors import FailedPrecondition
from weighting_service.update_log.redis_connection import RedisConnection

OLDEST = (6, 2)  # the first that trims a stream up to a position

# What an acknowledged append rests on, and what Redis does otherwise.
_DURABLE = {
    "appendonly": ("yes", "it keeps no log on its disk: a restart loses what came after its last dump"),
    "appendfsync": ("always", "it answers before its disk has the update: a power loss loses the last ones"),
    "no-appendfsync-on-rewrite": ("no", "it stops syncing while it rewrites its log: a power loss then loses more"),
    "maxmemory-policy": ("noeviction", "it may drop parts of the log when its memory is full"),
}


def check_kind(connection: RedisConnection) -> None:
    """Raises FailedPrecondition where the server can't keep an update log, whatever its settings."""
    info = connection.call("INFO", "server")
    version = str(info.get("redis_version", "0"))
    if tuple(int(part) for part in version.split(".")[:2]) < OLDEST:
        raise FailedPrecondition(
            f"Redis at {connection.where} is version {version}, expected {OLDEST[0]}.{OLDEST[1]} or newer; upgrade it"
        )
    if info.get("redis_mode") == "cluster":
        raise FailedPrecondition(
            f"Redis at {connection.where} is part of a cluster, and an update log needs one whole server; name a Redis "
            "that runs alone (with replicas, if you like)"
        )


def durability_problems(connection: RedisConnection) -> tuple[str, ...]:
    """A sentence for each setting by which an acknowledged update may be lost, with redis.conf's line that helps."""
    try:
        found = connection.in_a_row([("CONFIG GET", name) for name in _DURABLE])
    except FailedPrecondition as exc:
        return (_not_told(connection, exc.message),)
    problems = []
    for (name, (wanted, otherwise)), answer in zip(_DURABLE.items(), found, strict=True):
        value = answer.get(name)
        if value is None:
            problems.append(_not_told(connection, f"it has no setting {name}"))
        elif value != wanted:
            problems.append(
                f"Redis at {connection.where} has `{name} {value}`, by which {otherwise}; put the line "
                f"`{name} {wanted}` into its redis.conf (or `CONFIG SET {name} {wanted}`)"
            )
    return tuple(problems)


def _not_told(connection: RedisConnection, why: str) -> str:
    wanted = ", ".join(f"`{name} {value}`" for name, (value, _) in _DURABLE.items())
    return (
        f"Redis at {connection.where} does not tell its settings ({why}), so whether it keeps what it acknowledged is "
        f"not known; see to it that it has {wanted}, and let the service's user run CONFIG GET"
    )
