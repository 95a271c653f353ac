"""The variables that launchers and operators set for a rank, read from any mapping.

Every function takes the environment as a mapping, so that nothing here reads `os.environ`.
"""

from megalite.launchers.hosts import first_host, first_of_job
from megalite.launchers.launch import ALONE, Launch, is_number, number
from megalite.launchers.mpi import find_mpi_rank
from megalite.launchers.names import is_launchers_own
from megalite.launchers.read import read_launch

__all__ = [
    "ALONE",
    "Launch",
    "find_mpi_rank",
    "first_host",
    "first_of_job",
    "is_launchers_own",
    "is_number",
    "number",
    "read_launch",
]
