"""TorchServe: archives the handler and runs the Java frontend. https://pytorch.org/serve"""

import json
import os
import subprocess
import sys
from pathlib import Path

from benchmarks.rivals import torchserve_handler
from benchmarks.rivals.options import Options

# One access line for each request, without the models' own log and the metrics.
LOGGING = """<?xml version="1.0" encoding="UTF-8"?>
<Configuration>
  <Appenders><Console name="out"><PatternLayout pattern="%d %p %c - %m%n"/></Console></Appenders>
  <Loggers>
    <Logger name="ACCESS_LOG" level="info"/>
    <Root level="warn"><AppenderRef ref="out"/></Root>
  </Loggers>
</Configuration>
"""


def properties(options: Options, store: Path) -> dict[str, str | int]:
    """The contents of `config.properties`."""
    model = {
        "defaultVersion": True, "marName": "classifier.mar",
        "minWorkers": options.workers, "maxWorkers": options.workers,
        "batchSize": options.max_requests, "maxBatchDelay": options.wait_ms,
        "responseTimeout": 120,
    }  # fmt: skip
    address = "http://127.0.0.1"
    return {
        "inference_address": f"{address}:{options.port}",
        "management_address": f"{address}:{options.port + 1}",
        "metrics_address": f"{address}:{options.port + 2}",
        "grpc_inference_port": options.port + 3,
        "grpc_management_port": options.port + 4,
        "model_store": str(store),
        "load_models": "classifier.mar",
        "models": json.dumps({"classifier": {"1.0": model}}),
        "job_queue_size": 1000,
        "default_response_timeout": 120,
        "enable_metrics_api": "false",
        "disable_system_metrics": "true",
        "disable_token_authorization": "true",
        "vmargs": f"-Xmx512m -Dlog4j.configurationFile=file://{store / 'log4j2.xml'}",
    }


def main() -> None:
    options = Options.from_environment()
    store, programs = options.folder, Path(sys.executable).parent
    archive = [
        str(programs / "torch-model-archiver"), "--model-name", "classifier", "--version", "1.0",
        "--handler", torchserve_handler.__file__, "--export-path", str(store), "--force",
    ]  # fmt: skip
    subprocess.run(archive, check=True)
    (store / "log4j2.xml").write_text(LOGGING)
    config = store / "config.properties"
    lines = (f"{name}={value}\n" for name, value in properties(options, store).items())
    config.write_text("".join(lines))
    os.chdir(store)
    os.environ["PATH"] = f"{programs}:{os.environ['PATH']}"  # the frontend starts `python`
    os.environ["LOG_LOCATION"] = os.environ["METRICS_LOCATION"] = str(store)
    command = [
        str(programs / "torchserve"), "--start", "--foreground", "--ncs", "--disable-token-auth",
        "--model-store", str(store), "--ts-config", str(config),
    ]  # fmt: skip
    os.execv(command[0], command)


if __name__ == "__main__":
    main()
