# covers: megalite/train/outcome.py
"""The reason that status.json gives for the end of a start."""

from __future__ import annotations

import pytest

from megalite.errors import CheckpointError, Stopped, Superseded
from megalite.train.outcome import lost_rank, plain_cause, verdict

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
def test_a_lost_ranks_cause_is_one_plain_line(message: str, cause: str) -> None:
    assert plain_cause(message) == cause
    error = lost_rank(RuntimeError(message))
    assert str(error).startswith("another rank no longer answers: see what ended it first")
    assert str(error).endswith(f"goes on from the last checkpoint ({cause})")
    assert str(error).isascii()


def test_other_errors_are_their_own() -> None:
    assert lost_rank(RuntimeError("CUDA out of memory")) is None
    assert lost_rank(ValueError("Broken pipe")) is None


def test_states() -> None:
    assert verdict(Stopped("by SIGTERM")) == ("stopped", "Stopped: by SIGTERM")
    assert verdict(Superseded("x"))[0] == "superseded"
    assert verdict(CheckpointError("x"))[0] == verdict(KeyError("x"))[0] == "failed"
