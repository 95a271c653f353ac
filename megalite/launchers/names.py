"""Names of the variables that launchers set for their ranks."""

from __future__ import annotations

from megalite.launchers.clusters import NAMES
from megalite.launchers.mpi import MPI_LAUNCHERS

_PREFIXES = (
    *("SLURM_", "TORCHELASTIC_", "OMPI_", "PMI", "PRTE_", "MV2_COMM_", "MVP_COMM_", "MPI_LOCAL"),
    *("HYDI_", "PALS_", "FLUX_", "JSM_", "PET_", "LSB_", "PBS_", "LWS_"),
)
_TORCHRUNS = ("GROUP_WORLD_SIZE", "ROLE_NAME", "ROLE_RANK", "ROLE_WORLD_SIZE", "LOCAL_SIZE")
_NAMES = {*NAMES, *_TORCHRUNS, *(key for mpi in MPI_LAUNCHERS for key in mpi.keys)}


def is_launcher_variable(name: str) -> bool:
    """Return whether a launcher sets this variable to describe a rank, its world or its hosts."""
    return name.startswith(_PREFIXES) or name in _NAMES
