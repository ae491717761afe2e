"""The protocol files: linted, compatible, and the generated code is what they generate."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from google.protobuf.descriptor_pb2 import DescriptorProto, FileDescriptorSet

ROOT = Path(__file__).parents[1]
STUBS = ROOT / "service/stubs"
CONTRACT = ROOT / "tests/contract"


def test_the_stubs_are_fresh(tmp_path: Path) -> None:
    (tmp_path / "service/stubs").mkdir(parents=True)
    subprocess.run(["make", "-s", "proto", f"BIN={Path(sys.executable).parent}", f"OUT={tmp_path}"],
                   cwd=ROOT, check=True, capture_output=True)  # fmt: skip
    generated = {path.name: path.read_text() for path in (tmp_path / "service/stubs").iterdir()}
    committed = {path.name: path.read_text() for path in STUBS.glob("*_pb2*")}
    assert generated == committed


def test_the_protocol_files_are_clean() -> None:
    protolint = Path(sys.executable).with_name("protolint")
    if not protolint.exists() and shutil.which("protolint") is None:
        pytest.skip("protolint is not installed (pip install protolint-bin)")
    found = subprocess.run([protolint, "lint", "proto"], cwd=ROOT, capture_output=True, check=False)
    assert found.returncode == 0, found.stderr.decode()


def declarations(path: Path, folder: Path) -> set[str]:
    """What clients rely on in a protocol file: methods, fields with their types, enum values."""
    output = folder / "descriptors.bin"
    command = [sys.executable, "-m", "grpc_tools.protoc", f"-I{path.parent}", path.name]
    subprocess.run([*command, f"--descriptor_set_out={output}"], check=True)
    [file] = FileDescriptorSet.FromString(output.read_bytes()).file
    lines = {
        f"{service.name}.{method.name} {str(method).split()}"
        for service in file.service
        for method in service.method
    }
    lines |= {
        f"{enum.name} {str(value).split()}" for enum in file.enum_type for value in enum.value
    }
    return lines.union(*(fields(message) for message in file.message_type))


def fields(message: DescriptorProto) -> set[str]:
    lines = {f"{message.name} {str(field).split()}" for field in message.field}
    return lines.union(*(fields(nested) for nested in message.nested_type))


@pytest.mark.parametrize("path", ["vitrail/v1/vision.proto", "inference/open_inference.proto"])
def test_what_clients_know_of_a_protocol_stays_as_it_is(path: str, tmp_path: Path) -> None:
    known = declarations(CONTRACT / Path(path).name, tmp_path)
    assert len(known) > 40
    assert known - declarations(ROOT / "proto" / path, tmp_path) == set()
