"""The rivals' virtual environments. They see this environment's torch through a `.pth` file."""

import subprocess
import sys
import sysconfig
import tomllib
import venv
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path

# Environments, weights, photos and logs of the benchmarks.
FOLDER = Path(".rivals")
SHARED = ("torch", "torchvision", "timm")


def packages() -> Mapping[str, list[str]]:
    """For each rival the pinned packages of its environment, from `versions.toml`."""
    text = Path(__file__).with_name("versions.toml").read_text(encoding="utf-8")
    return tomllib.loads(text)


def python_of(name: str, folder: Path) -> Path:
    """The interpreter that runs a rival. It exists once the rival is installed."""
    return folder / name / "bin" / "python" if packages()[name] else Path(sys.executable)


def install(name: str, folder: Path) -> None:
    """Create a rival's environment, or bring it to the pinned versions.

    Raises:
        CalledProcessError: pip failed; its output is on stderr.
    """
    if not (pins := packages()[name]):
        return
    python = python_of(name, folder)
    if not python.exists():
        venv.create(folder / name, with_pip=True)
    library = f"python{sys.version_info.major}.{sys.version_info.minor}"
    shared = folder / name / "lib" / library / "site-packages" / "shared.pth"
    shared.write_text(sysconfig.get_path("purelib") + "\n")
    # Held to the shared versions, so that no rival brings a torch of its own.
    constraints = folder / "constraints.txt"
    constraints.write_text("".join(f"{each}=={version(each)}\n" for each in SHARED))
    command = [str(python), "-m", "pip", "install", "-q", "--disable-pip-version-check"]
    subprocess.run([*command, "-c", str(constraints), *pins], check=True)
