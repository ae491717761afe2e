"""`vitrail ray` as its user starts it: a deployment for each group of trunks on a local Ray."""

import asyncio
import itertools
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from models.catalog import load_catalog
from models.heads.files import HeadFile, encode_head
from service.errors import DeadlineExceededError, UnavailableError
from service.head_file import trunk_of
from service.ray.groups import TrunkGroup, trunk_groups
from service.ray.scaling import scale_by_queue
from service.settings import Settings
from tests.conftest import Running, answers, free_port, process, running, wait_until

# The contract's tests, which this module's `tiny` sends to Ray.
from tests.service.test_gateway import (  # noqa: F401
    as_files,
    test_an_unreadable_input_has_its_own_line_and_hides_no_wrong_model,
    test_answers_are_strict_json,
    test_bad_deadlines_and_priorities_are_told,
    test_bad_images_get_their_status,
    test_data_uris_are_taken_as_base64,
    test_embeddings_come_as_floats_base64_or_npy,
    test_every_task_can_answer_in_lines,
    test_headers_are_checked_before_the_body,
    test_lists_repeat_in_forms_and_queries_and_are_arrays_in_json,
    test_malformed_bodies_are_told_apart,
    test_models_are_listed_and_described,
    test_multipart_raw_and_json_give_one_answer,
    test_odd_but_good_images_are_answered,
    test_request_ids_are_the_callers_if_they_are_harmless,
    test_results_are_in_order_and_a_bad_image_fails_alone,
    test_timing_tells_where_the_time_went,
    test_too_many_images_and_parts_are_413,
    test_unknown_models_routes_and_methods,
    test_wrong_parameters_are_named,
)
from tests.service.test_heads import make, upload  # noqa: F401

# How often replicas ask what has changed, see service/processes/ray_replica.py.
SYNC_INTERVAL_S = 1.0


@pytest.fixture(scope="module")
def tiny(tiny_catalog: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """The tiny catalog on a Ray that is started for it."""
    port, grpc_port = free_port(), free_port()
    url = f"http://127.0.0.1:{port}"
    command = ["ray", "--catalog", str(tiny_catalog), "--port", str(port), "--cpus", "0.25"]
    command += ["--grpc-port", str(grpc_port)]
    environment = {
        "VITRAIL_HEADS_FOLDER": str(tmp_path_factory.mktemp("heads")),
        "VITRAIL_ADMIN_KEYS": "admin",
        "VITRAIL_DEVICE": "cpu",
        "VITRAIL_LOG_LEVEL": "warning",
        "RAY_DEDUP_LOGS": "0",
        "RAY_worker_niceness": "0",  # 15 by default: beside other tests replicas start for minutes
    }
    with process(*command, **environment) as server:
        wait_until(lambda: answers(f"{url}/readyz") or server.poll() is not None, 200)
        assert server.poll() is None
        with httpx.Client(base_url=url, timeout=60) as client:
            client.headers["X-API-Key"] = "admin"
            yield Running(url, client, None, f"127.0.0.1:{grpc_port}")  # type: ignore[arg-type]
        server.terminate()
        assert server.wait(60) == 0


def rounded(value: Any) -> Any:
    """Without the last digits, which depend on how many threads share a pass."""
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    return [rounded(item) for item in value] if isinstance(value, list) else value


def test_answers_are_those_of_one_process(
    tiny: Running, tiny_catalog: Path, jpegs: dict[str, bytes]
) -> None:
    """Also of requests whose models are in two deployments."""
    photos = as_files(*jpegs.values(), b"no image")
    with running(tiny_catalog) as alone:
        alone.wait_ready()
        for path in ("/classify", "/embed?model=conv", "/predict?models=tiny&models=conv"):
            ours, theirs = (
                server.client.post(path, files=photos).json() for server in (tiny, alone)
            )
            assert rounded(ours) == rounded(theirs)
        for name in ("tiny", "conv"):
            ours, theirs = (s.client.get(f"/models/{name}").json() for s in (tiny, alone))
            assert ours.pop("load_seconds") > 0
            assert theirs.pop("load_seconds") > 0
            assert ours == theirs
        for path in ("/classify?model=none", "/segment", "/classify?model=tiny&top_k=0"):
            ours, theirs = (s.client.post(path, files=photos).json() for s in (tiny, alone))
            assert ours.pop("request_id") != theirs.pop("request_id")
            assert ours == theirs


def test_an_uploaded_head_is_a_model(
    tiny: Running,
    make: Callable[..., HeadFile],  # noqa: F811
    jpegs: dict[str, bytes],
) -> None:
    photo = jpegs["coffee"]
    assert trunk_of(encode_head(make())) == "tiny"
    answer = upload(tiny, "pets", make())
    assert answer.status_code == 201, answer.text
    assert answer.json()["state"] == "ready"

    def ask() -> httpx.Response:
        return tiny.client.post("/classify?model=pets", content=photo)

    end = time.monotonic() + 2 * SYNC_INTERVAL_S  # other groups' replicas hear of the head, too
    while time.monotonic() < end:
        assert ask().status_code == 200, ask().text
    assert upload(tiny, "pets", make()).status_code == 409
    assert [head["name"] for head in tiny.client.get("/heads").json()["heads"]] == ["pets"]
    assert tiny.client.delete("/heads/pets").is_success
    assert ask().status_code == 404
    assert tiny.client.delete("/heads/pets").status_code == 404


def test_models_load_and_unload(tiny: Running, jpegs: dict[str, bytes]) -> None:
    for state, status in (("unloaded", 503), ("ready", 200)):
        verb = state.replace("ready", "loaded").removesuffix("ed")
        assert tiny.client.post(f"/models/conv/{verb}").json()["state"] == state
        answer = tiny.client.post("/classify?model=conv", content=jpegs["coffee"])
        assert answer.status_code == status
    assert tiny.client.post("/models/none/load").status_code == 404


def test_admins_see_the_replicas(tiny: Running) -> None:
    answer = tiny.client.get("/debug/queues", headers={"X-API-Key": "admin"})
    groups = answer.json()["groups"]
    assert groups
    assert all(replica["ready"] for group in groups.values() for replica in group.values())


def test_a_deadline_is_kept(tiny: Running, jpegs: dict[str, bytes]) -> None:
    late = {"X-Timeout-Ms": "0.01"}
    answer = tiny.client.post("/classify", content=jpegs["coffee"], headers=late)
    assert answer.status_code == 504


# -- without a Ray ---------------------------------------------------------------------------


def test_trunks_that_one_model_uses_are_placed_together(
    tiny_catalog: Path, clip: tuple[Path, Any]
) -> None:
    tiny_groups = trunk_groups(load_catalog(tiny_catalog))
    assert [(g.name, list(g.models)) for g in tiny_groups] == [
        ("conv", ["conv"]),
        ("tiny", ["tiny", "tiny-embed"]),
    ]
    [towers] = trunk_groups(load_catalog(clip[0]))
    assert towers.trunks == {"clip-image", "clip-text"}
    assert set(towers.models) == set(load_catalog(clip[0]).models)


def test_only_groups_of_the_named_models_are_deployed(tiny_catalog: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Ray's own
        from service.processes.ray import read_catalog

    catalog = read_catalog(Settings(catalog=str(tiny_catalog), models=["tiny-embed"]))
    assert [group.name for group in trunk_groups(catalog)] == ["tiny"]
    assert list(catalog.models) == ["tiny", "tiny-embed"]
    assert set(catalog.trunks) == {"tiny"}
    assert {*catalog.defaults.values(), *catalog.startup} <= catalog.models.keys()
    everything = read_catalog(Settings(catalog=str(tiny_catalog)))
    assert len(trunk_groups(everything)) == 2


class Context:
    """What Ray tells a policy."""

    def __init__(self, *queues: float, requests: float = 1) -> None:
        self.current_num_replicas = len(queues)
        self.total_num_requests = requests
        ids = itertools.count()
        self.aggregated_metrics = {"queue_seconds": {next(ids): value for value in queues}}


def test_replicas_follow_the_waiting_work() -> None:
    def replicas(*queues: float, requests: float = 1) -> int:
        count, _ = scale_by_queue(Context(*queues, requests=requests))
        return count

    assert replicas(0.1) == 1
    assert replicas(0.9) == 4
    assert replicas(0.2, 0.2, 0.2) == 3
    assert replicas(0.0, 0.0) == 1
    assert replicas(0.0, requests=0) == 0
    assert replicas(requests=0) == 0
    assert replicas(requests=5) == 1


def test_a_fraction_of_a_gpu_and_the_bounds_reach_ray(tiny_catalog: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Ray's own
        from service.processes.ray import Placement, bind

    settings = Settings(catalog=str(tiny_catalog))
    group = trunk_groups(load_catalog(tiny_catalog))[0]
    placement = Placement(replicas=0, max_replicas=4, cpus=2, gpus=0.25)
    deployment = bind(settings, group, placement)._bound_deployment
    assert deployment.ray_actor_options["num_gpus"] == 0.25
    scaling = deployment._deployment_config.autoscaling_config
    assert (scaling.min_replicas, scaling.max_replicas) == (0, 4)
    assert not scaling.policy.is_default_policy_function()


def test_replicas_learn_what_changed_also_from_an_actor_that_was_started_anew(
    tmp_path: Path,
) -> None:
    from service.ray.state import State, Version

    first = State(str(tmp_path / "first"))
    first.put_head("kept", b"1")
    everything = first.since(Version())
    assert (everything.heads, everything.reset) == ({"kept": b"1"}, True)
    first.put_head("new", b"2")
    first.delete_head("kept")
    changes = first.since(everything.version)
    assert (changes.heads, changes.reset) == ({"new": b"2", "kept": None}, False)
    assert first.since(changes.version).heads == {}

    # with as many changes as the first one had, whose versions must not pass for its own
    again = State(str(tmp_path / "other"))
    for name in ("a", "b", "c"):
        again.put_head(name, b"3")
    changes = again.since(changes.version)
    assert (set(changes.heads), changes.reset) == ({"a", "b", "c"}, True)
    assert not again.since(changes.version).reset
    restarted = State(str(tmp_path / "first")).since(Version())
    assert restarted.heads == {"new": b"2"}


def test_a_replica_that_hangs_is_waited_for_until_a_limit() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Ray's own
        from ray import serve

        from service.ray.group import Group

    class Hanging:
        async def describe(self, caller: Any, name: str) -> str:
            await asyncio.sleep(0 if name == "quick" else 3600)
            return name

    application = serve.deployment(Hanging).bind()
    handle = serve.run(application, _local_testing_mode=True, route_prefix=None)
    group = Group(TrunkGroup("tiny", frozenset({"tiny"}), ["tiny"]), handle)

    async def ask() -> None:
        with pytest.raises(UnavailableError, match="is loading"):
            await group.one("describe", "quick")
        group.started = True
        assert await group.one("describe", "quick") == "quick"
        with pytest.raises(DeadlineExceededError, match="no replica of trunk 'tiny' answered"):
            await group.one("describe", "slow", timeout_s=0.05)
        with pytest.raises(DeadlineExceededError, match="not every replica of trunk 'tiny'"):
            await group.every("describe", "slow", timeout_s=0.05)

    asyncio.run(ask())
