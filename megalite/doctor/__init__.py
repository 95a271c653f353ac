"""What a machine, and a run on it, lack: each check a row, with what to do about it."""

from megalite.doctor.examine import examine
from megalite.doctor.row import Row, show

__all__ = ["Row", "examine", "show"]
