import subprocess

import pytest
from pydantic import ValidationError

from service.cli.starting import setting_problems
from service.processes.child_settings import assigned_gpus, child_environment, worker_settings
from service.settings import Settings
from service.unknown_variables import unknown_variables
from service.worker_options import WorkerOptions, usable_cores


def test_flags_win_over_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VITRAIL_PORT", "9000")
    monkeypatch.setenv("VITRAIL_MODELS", "a, b,")
    monkeypatch.setenv("VITRAIL_API_KEYS", "")
    assert Settings().port == 9000
    assert Settings(port=9001).port == 9001
    assert Settings().models == ("a", "b")
    assert Settings().api_keys == ()


def test_dtype_is_the_other_name_of_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VITRAIL_DTYPE", "bfloat16")
    assert Settings().precision == "bfloat16"
    assert Settings(precision="float16").precision == "float16"
    assert child_environment(Settings())["VITRAIL_PRECISION"] == "bfloat16"
    monkeypatch.setenv("VITRAIL_PRECISION", "int8")
    assert Settings().precision == "int8"


def test_secrets_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VITRAIL_ADMIN_KEYS", "hush")
    assert "hush" not in repr(Settings())


@pytest.mark.parametrize("wrong", [{"port": -1}, {"precision": "int3"}, {"max_images": 0}])
def test_wrong_settings_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        Settings(**wrong)  # type: ignore[arg-type]


def test_defaults_fit_the_machine() -> None:
    cpu = WorkerOptions().resolve("cpu")
    assert cpu.threads == usable_cores() >= 1
    assert cpu.streams * cpu.lane_threads <= max(cpu.threads, cpu.streams)
    assert WorkerOptions().resolve("cuda").streams == 2
    assert WorkerOptions(streams=3, max_batch_size=5).resolve("cpu").max_batch_size == 5


def test_local_workers_share_the_cores_whatever_their_device() -> None:
    cores = max(1, usable_cores() // 2)
    for gpu, device in ((None, "auto"), ("1", "cuda")):
        share = worker_settings(Settings(), 2, gpu)
        assert (share.threads, share.decode_threads, share.device) == (cores, cores, device)
    assert worker_settings(Settings(decode_threads=5), 2, "0").decode_threads == 5


@pytest.mark.parametrize(
    ("visible", "seen", "gpus"),
    [
        (None, 0, [None] * 3),
        (None, 2, ["0", "1", "0"]),
        ("2, 5", 2, ["2", "5", "2"]),
        ("2,5,-1,6", 2, ["2", "5", "2"]),  # none is seen after one that is not there
        ("MIG-a,MIG-b", 1, ["MIG-a", "MIG-b", "MIG-a"]),
        ("MIG-a,MIG-b", 0, [None] * 3),
    ],
)
def test_each_local_worker_sees_one_gpu(
    monkeypatch: pytest.MonkeyPatch, visible: str | None, seen: int, gpus: list[str | None]
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    answer = subprocess.CompletedProcess([], 0, stdout=f"{seen}\n".encode())
    monkeypatch.setattr(subprocess, "run", lambda *arguments, **options: answer)
    assert assigned_gpus(Settings(), 3) == gpus
    assert assigned_gpus(Settings(device="cuda:1"), 3) == [None] * 3


def test_misspelt_variables_are_named() -> None:
    names = ["VITRAIL_API_KEY", "VITRAIL_MAX_QUE_SIZE", "VITRAIL_STORE", "VITRAIL_PORT", "HOME"]
    assert list(unknown_variables(Settings(), names)) == [
        "VITRAIL_API_KEY is not a setting; did you mean VITRAIL_API_KEYS?",
        "VITRAIL_MAX_QUE_SIZE is not a setting; did you mean VITRAIL_MAX_QUEUE_SIZE?",
    ]
    assert list(unknown_variables(Settings(api_keys="a"), names[:1])) == []
    assert list(unknown_variables(Settings(), names[:1], serves=False)) == []
    assert list(unknown_variables(Settings(), ["VITRAIL_SERVICE_HOST"])) == [
        "VITRAIL_SERVICE_HOST is not a setting"
    ]


@pytest.mark.parametrize(
    ("wrong", "variable", "problem"),
    [
        ({"VITRAIL_PORT": "tcp://10.0.0.1:80"}, "VITRAIL_PORT", "should be a valid integer"),
        ({"VITRAIL_DTYPE": "int3"}, "VITRAIL_PRECISION", "should be 'auto'"),
        ({"VITRAIL_WORKERS": "gpu-a"}, "VITRAIL_WORKERS", "'gpu-a' is not host:port"),
        ({"VITRAIL_TLS_CERT": "a.pem"}, "", "set both of tls_cert and tls_key, or neither"),
    ],
)
def test_errors_name_the_variable(
    monkeypatch: pytest.MonkeyPatch, wrong: dict[str, str], variable: str, problem: str
) -> None:
    for name, value in wrong.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValidationError) as error:
        Settings()
    [(named, text)] = setting_problems(error.value)
    assert named == variable
    assert text.removeprefix("Input ").startswith(problem)
