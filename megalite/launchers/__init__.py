"""Interpret the variables that launchers and operators set for a rank.

Every function takes the environment as a mapping; nothing here reads `os.environ`.
"""

from megalite.launchers.hosts import first_of_job, first_of_nodelist
from megalite.launchers.launch import ALONE, Launch, is_number, read_int
from megalite.launchers.mpi import find_mpi_rank
from megalite.launchers.names import is_launcher_variable
from megalite.launchers.read import read_launch

__all__ = [
    "ALONE",
    "Launch",
    "find_mpi_rank",
    "first_of_job",
    "first_of_nodelist",
    "is_launcher_variable",
    "is_number",
    "read_int",
    "read_launch",
]
