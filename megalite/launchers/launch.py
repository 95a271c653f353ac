"""`Launch`, the description of one rank of a launch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from megalite.errors import LaunchError


@dataclass(frozen=True)
class Launch:
    """One rank's position in the world, and the address at which the ranks connect.

    Attributes:
        rank: rank in the world.
        world_size: number of ranks.
        local_rank: rank on its host.
        local_world_size: number of ranks on its host.
        master_addr: host of rank 0. Empty if it is another, unknown host; the ranks then agree on
            the address when they start.
        master_port: port of rank 0. 0 means any free port; several ranks agree on it when they
            start.
        source: "torchrun" (also for deepspeed, which sets the same variables), "srun", the name of
            an MPI launcher, or "python".
    """

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    master_addr: str
    master_port: int
    source: str


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


def read_int(env: Mapping[str, str], key: str, default: int) -> int:
    """Return a variable as a whole number, or `default` if it is unset or empty.

    Raises:
        LaunchError: the variable is not a whole number.
    """
    value = env.get(key, "")
    if not value:
        return default
    if not is_number(value) or len(value) > 18:
        raise LaunchError(
            f"{key}={value[:40]!r} is not a whole number of 0 or more; correct or unset it"
        )
    return int(value)


def check_range(launch: Launch) -> None:
    """Refuse ranks outside their world, and invalid ports.

    Raises:
        LaunchError: the number that is out of range.
    """
    if not 0 <= launch.rank < launch.world_size:
        raise LaunchError(
            f"rank {launch.rank} of a world of {launch.world_size}: ranks range from 0 to "
            f"{launch.world_size - 1}; check the variables of the launcher"
        )
    if launch.master_port > 65535:
        raise LaunchError(f"MASTER_PORT={launch.master_port}: set it to at most 65535")
    if not 0 <= launch.local_rank < launch.local_world_size <= launch.world_size:
        raise LaunchError(
            f"local rank {launch.local_rank} of {launch.local_world_size} on this host, in a world "
            f"of {launch.world_size}; check LOCAL_RANK and LOCAL_WORLD_SIZE"
        )
