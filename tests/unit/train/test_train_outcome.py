# covers: megalite/train/outcome.py
"""The state and reason of a start's end in status.json."""

from __future__ import annotations

import pytest

from megalite.errors import CheckpointError, Stopped, Superseded
from megalite.train.outcome import end_state, lost_rank, plain_cause

SOURCE = "[/__w/pytorch/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:553] "
PICTURE = "\N{BEACH WITH UMBRELLA}"
ADVICE = f". This may indicate a remote rank has failed; check its log. GLHF! {PICTURE}"


@pytest.mark.parametrize(
    ("message", "cause"),
    [
        (
            f"{SOURCE}Connection closed by peer [127.0.0.1]:36223{ADVICE}",
            "Connection closed by peer [127.0.0.1]:36223",
        ),
        (f"{SOURCE}Read error [10.0.0.2]:1: Connection reset by peer{ADVICE}",
         "Read error [10.0.0.2]:1: Connection reset by peer"),
        (f"{SOURCE}Socket unexpectedly closed. GLHF! {PICTURE}",
         "Socket unexpectedly closed"),
        ("writev [10.0.0.2]:81: Broken pipe\nException raised from a.cc:3", 
         "writev [10.0.0.2]:81: Broken pipe"),
        ("NCCL error in: /opt/x/ProcessGroupNCCL.cpp:11, remote process exited",
         "NCCL error in: remote process exited"),
    ],
)  # fmt: skip
def test_lost_rank_reports_its_cause_in_one_line(message: str, cause: str) -> None:
    assert plain_cause(message) == cause
    error = lost_rank(RuntimeError(message))
    assert str(error).startswith("another rank no longer answers: find the cause in that rank's")
    assert str(error).endswith(f"resumes from the last checkpoint ({cause})")
    assert str(error).isascii()


def test_lost_rank_ignores_other_errors() -> None:
    assert lost_rank(RuntimeError("CUDA out of memory")) is None
    assert lost_rank(ValueError("Broken pipe")) is None


def test_end_state_follows_from_the_error() -> None:
    assert end_state(Stopped("by SIGTERM")) == ("stopped", "Stopped: by SIGTERM")
    assert end_state(Superseded("x"))[0] == "superseded"
    assert end_state(CheckpointError("x"))[0] == end_state(KeyError("x"))[0] == "failed"
