"""The names of the exported metrics."""

from pathlib import Path

from tests.conftest import running


def test_triton_names_stand_beside_ours(tiny_catalog: Path, jpegs: dict[str, bytes]) -> None:
    with running(tiny_catalog, models=("tiny",), triton_metrics=True) as server:
        server.wait_ready()
        for content in (jpegs["coffee"], jpegs["rocket"], b"no image"):
            server.client.post("/classify?model=tiny", content=content)
        assert server.metric("nv_inference_request_success", model="tiny", version="1") == 2
        assert server.metric("nv_inference_request_failure", model="tiny") == 1
        assert server.metric("nv_inference_count", model="tiny") == 2
        assert server.metric("nv_inference_exec_count", model="tiny") == server.metric(
            "vitrail_batch_size_count", trunk="tiny"
        )
        for stage in ("queue", "compute_input", "compute_infer", "compute_output"):
            assert server.metric(f"nv_inference_{stage}_duration_us", model="tiny") > 0
        ours = server.metric("vitrail_request_duration_seconds_sum", model="tiny", outcome="ok")
        theirs = server.metric("nv_inference_request_duration_us", model="tiny")
        assert theirs == 1e6 * ours
        assert server.metrics().count("# TYPE nv_inference_count ") == 1


def test_ours_stand_alone_by_default_and_without_times_of_creation(
    tiny_catalog: Path, jpegs: dict[str, bytes]
) -> None:
    with running(tiny_catalog, models=("tiny",)) as server:
        server.wait_ready()
        server.client.post("/classify?model=tiny", content=jpegs["coffee"])
        text = server.metrics()
    assert "vitrail_requests_total" in text
    assert "nv_inference" not in text
    assert "_created" not in text
