"""One rank of a launch, and the numbers that describe it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from megalite.errors import LaunchError


@dataclass(frozen=True)
class Launch:
    """One rank's place in the world, and where the ranks meet."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    master_addr: str  # "": on another host, not known yet; the ranks agree on it as they start
    master_port: int  # 0: any free port; several ranks agree on one as they start
    source: str  # "torchrun" (deepspeed uses the same variables), "srun", an MPI, or "python"


ALONE = Launch(
    rank=0,
    world_size=1,
    local_rank=0,
    local_world_size=1,
    master_addr="127.0.0.1",
    master_port=0,
    source="python",
)


def is_number(value: str) -> bool:
    """Return whether a text is a whole number of 0 or more, in ASCII digits."""
    return value.isascii() and value.isdigit()  # "²" is a digit too


def number(env: Mapping[str, str], key: str, default: int) -> int:
    """Return the whole number a variable holds, or `default` if it is unset or empty.

    Raises:
        LaunchError: the variable holds something else.
    """
    value = env.get(key, "")
    if not value:
        return default
    if not is_number(value) or len(value) > 18:
        raise LaunchError(f"{key}={value[:40]!r} is not a whole number of 0 or more")
    return int(value)


def check_range(launch: Launch) -> None:
    """Refuse ranks outside their world and ports that no host has."""
    if not 0 <= launch.rank < launch.world_size:
        raise LaunchError(
            f"rank {launch.rank} of a world of {launch.world_size}: ranks run from 0 to "
            f"{launch.world_size - 1}; check what the launcher exports"
        )
    if launch.master_port > 65535:
        raise LaunchError(f"MASTER_PORT={launch.master_port}: ports end at 65535")
    if not 0 <= launch.local_rank < launch.local_world_size <= launch.world_size:
        raise LaunchError(
            f"local rank {launch.local_rank} of {launch.local_world_size} on this host, in a world "
            f"of {launch.world_size}; check LOCAL_RANK and LOCAL_WORLD_SIZE"
        )
