"""Engines: how a trunk's passes are run. One file each, found by being in this package."""

import sys

# OpenVINO without its telemetry, which would send events of every import and conversion to its
# vendor, each from a fork of this process. It does without the package if it is missing.
sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
