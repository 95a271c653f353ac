"""A port that another process uses is an error with a remedy."""

from __future__ import annotations

import os
import socket

import pytest
import torch

from megalite import env
from megalite.env import Launch
from megalite.errors import LaunchError
from megalite.parallel import start


def test_busy_port_is_named_in_the_error() -> None:
    environ, threads = dict(os.environ), torch.get_num_threads()
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        try:
            with pytest.raises(LaunchError, match=f"MASTER_PORT {port} of 127.0.0.1 is in use"):
                start(Launch(0, 2, 0, 2, "127.0.0.1", port, "srun"))
        finally:
            env.replace(environ)
            torch.set_num_threads(threads)
