"""The manifests of docs/kubernetes.md agree with the exit codes and the launch variables."""

from __future__ import annotations

import re
from typing import Any

import pytest

from megalite.config.schema import CheckpointConfig
from megalite.env import find_launch
from megalite.errors import Stopped, Superseded, UserError
from tests.pages import ROOT

yaml = pytest.importorskip("yaml", reason="PyYAML is not installed")
TEXT = (ROOT / "docs" / "kubernetes.md").read_text(encoding="utf-8")
MANIFESTS: list[dict[str, Any]] = [
    manifest
    for block in re.findall(r"^```yaml\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)
    for manifest in yaml.safe_load_all(block)
]
JOBS = [manifest for manifest in MANIFESTS if manifest["kind"] == "Job"]


@pytest.mark.parametrize("job", JOBS, ids=["one node", "several nodes"])
def test_job_restarts_only_after_exit_codes_that_can_be_resumed(job: dict[str, Any]) -> None:
    spec = job["spec"]
    actions = {
        code: rule["action"]
        for rule in spec["podFailurePolicy"]["rules"]
        if "onExitCodes" in rule
        for code in rule["onExitCodes"]["values"]
    }
    assert actions == {
        UserError.exit_code: "FailJob",
        Superseded.exit_code: "FailJob",
        Stopped.exit_code: "Ignore",
    }
    pod = spec["template"]["spec"]
    assert pod["restartPolicy"] == "Never"  # a podFailurePolicy requires it
    [container] = pod["containers"]
    names = [
        rule["onExitCodes"]["containerName"]
        for rule in spec["podFailurePolicy"]["rules"]
        if "onExitCodes" in rule
    ]
    assert set(names) == {container["name"]}
    grace = CheckpointConfig().stop_grace_seconds
    assert pod["terminationGracePeriodSeconds"] > grace
    assert (ROOT / container["command"][-1]).is_file()


def test_indexed_job_describes_its_ranks() -> None:
    job = JOBS[1]
    pod = job["spec"]["template"]["spec"]
    environ = {entry["name"]: entry.get("value", "3") for entry in pod["containers"][0]["env"]}
    launch = find_launch(environ)
    assert (launch.rank, launch.world_size) == (3, job["spec"]["completions"])
    assert launch.master_addr == f"{job['metadata']['name']}-0.{pod['subdomain']}"
    [service] = [manifest for manifest in MANIFESTS if manifest["kind"] == "Service"]
    assert service["metadata"]["name"] == pod["subdomain"]
    assert service["spec"]["selector"] == {"batch.kubernetes.io/job-name": job["metadata"]["name"]}
