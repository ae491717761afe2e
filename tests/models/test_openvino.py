"""The engine `openvino` as a part of a server's process."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("openvino")

CONVERT = """
import torch
from torch import nn
from models.trunks.devices import Placement
from models.trunks.engines.openvino import OpenVino
from models.trunks.features import PassPlan

class Double(nn.Module):
    def forward(self, pixels):
        return {"doubled": pixels * 2}

class Source:
    placement = Placement()
    identity = "double"

    def create_pass(self, plan):
        return Double()

    def summary(self, batch, tensors):
        return tensors["doubled"].flatten(1), False

engine = OpenVino(Source())
print(engine.run(PassPlan(), (torch.ones(1, 3, 2, 2),))["doubled"].sum().item())
"""


def test_a_conversion_leaves_no_trace_of_telemetry(tmp_path: Path) -> None:
    """The telemetry keeps its state in the home directory, unless it runs in continuous
    integration.
    """
    ci = ("CI", "TF_BUILD", "JENKINS_URL")
    environment = {name: value for name, value in os.environ.items() if name not in ci}
    result = subprocess.run(
        [sys.executable, "-c", CONVERT],
        env={**environment, "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.stdout.split() == ["24.0"], result.stderr
    assert not (tmp_path / "intel").exists()
