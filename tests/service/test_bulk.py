"""`vitrail bulk`: every image is one row, whatever is interrupted, unreadable or lost."""

import io
import tarfile
from dataclasses import replace
from pathlib import Path

import lancedb
import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner, Result

from models import Registry
from models.checkpoints.store import Store
from service.bulk.job import Job, Results
from service.bulk.runner import ShardRunner
from service.bulk.shards import Shard, SourceFormatError, list_shards, read_shard
from service.cli import app
from service.settings import Settings
from tests.conftest import process, wait_until


def bulk(catalog: Path, *arguments: str | Path) -> Result:
    command = ["bulk", *map(str, arguments), "--catalog", str(catalog), "--device", "cpu"]
    return CliRunner().invoke(app, command)


@pytest.fixture
def folder(tmp_path: Path, jpegs: dict[str, bytes]) -> Path:
    """Nine photos in folders, one file that is no image, and one that nobody asked for."""
    source = tmp_path / "photos"
    for n in range(3):
        (source / f"{n}").mkdir(parents=True)
        for name in ("astronaut", "chelsea", "coffee"):
            (source / f"{n}/{name}.jpg").write_bytes(jpegs[name])
    (source / "1/broken.png").write_bytes(b"no image")
    (source / "readme.txt").write_text("photos")
    return source


def rows(output: Path) -> dict[str, dict[str, object]]:
    table = ds.dataset([str(path) for path in output.glob("*.parquet")]).to_table()
    by_id = {str(row["id"]): row for row in table.to_pylist()}
    assert len(by_id) == table.num_rows  # nothing twice
    return by_id


def test_a_folder_becomes_rows_and_a_second_run_does_nothing(
    tiny_catalog: Path,
    folder: Path,
    tmp_path: Path,
    jpegs: dict[str, bytes],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("VITRAIL_API_KEY", "of the commands that call a server")
    output = tmp_path / "out"
    first = bulk(tiny_catalog, "classify", folder, output, "--shard-size", "4")
    assert first.exit_code == 0, first.output
    assert "10 images in 3 shards, 1 failed" in first.output
    assert "VITRAIL_API_KEY" not in first.output
    found = rows(output)
    assert len(found) == ds.dataset(output, format="parquet").count_rows() == 10
    broken = found.pop(str(folder / "1/broken.png"))
    assert "not an image" in str(broken["error"])
    assert broken["label"] is None
    assert {row["error"] for row in found.values()} == {None}
    registry = Registry.from_catalog(
        tiny_catalog, device="cpu", store=Store(tiny_catalog.parent / "store")
    )
    [expected] = registry.get("tiny").predict([jpegs["coffee"]])
    row = found[str(folder / "0/coffee.jpg")]
    predictions = expected["predictions"]
    assert row["index"] == [prediction["index"] for prediction in predictions]
    scores = [prediction["score"] for prediction in predictions]
    assert np.allclose(row["score"], scores, atol=1e-5)  # type: ignore[arg-type]
    schema = pq.read_schema(next(output.glob("*.parquet")))
    assert schema.metadata[b"model_digest"].startswith(b"sha256:")

    stamps = {path: path.stat().st_mtime_ns for path in output.glob("*.parquet")}
    second = bulk(tiny_catalog, "classify", folder, output, "--shard-size", "4")
    assert "0 images in 0 shards, 0 failed; 3 shards were done" in second.output
    assert stamps == {path: path.stat().st_mtime_ns for path in output.glob("*.parquet")}
    other = bulk(tiny_catalog, "embed", folder, output)
    assert other.exit_code == 2
    assert "another job" in other.output


def test_what_an_interruption_left_is_completed(
    tiny_catalog: Path, folder: Path, tmp_path: Path
) -> None:
    """Of three shards one is done, and one is half written."""
    undisturbed, output = tmp_path / "undisturbed", tmp_path / "out"
    for target in (undisturbed, output):
        assert bulk(tiny_catalog, "embed", folder, target, "--shard-size", "4").exit_code == 0
    _, second, third = sorted(output.glob("*.parquet"))
    second.rename(output / f".{second.stem}.partial")
    third.unlink()
    again = bulk(tiny_catalog, "embed", folder, output, "--shard-size", "4", "--lance")
    assert "2 shards" in again.output
    assert "1 shards were done" in again.output
    check_equal(rows(output), rows(undisturbed))
    bulk(tiny_catalog, "embed", folder, output, "--shard-size", "4", "--lance")  # in its place
    table = lancedb.connect(output).open_table("results")
    found = {row["id"]: row for row in table.to_arrow().to_pylist()}
    assert table.count_rows() == len(found) == 10
    check_equal(found, rows(output))
    wanted = str(folder / "0/coffee.jpg")
    hits = table.search(found[wanted]["embedding"]).limit(3).to_list()  # of three equal photos
    assert wanted in [hit["id"] for hit in hits]
    assert b"model_digest" in table.schema.metadata


@pytest.mark.nightly
def test_a_run_that_is_killed_loses_and_repeats_nothing(
    tiny_catalog: Path, tmp_path: Path, jpegs: dict[str, bytes]
) -> None:
    source, output, undisturbed = (tmp_path / name for name in ("photos", "out", "undisturbed"))
    source.mkdir()
    for n in range(200):
        (source / f"{n:03}.jpg").write_bytes(jpegs["coffee" if n % 2 else "rocket"])
    flags = ("--catalog", str(tiny_catalog), "--device", "cpu", "--shard-size", "5")
    command = ("bulk", "embed", str(source), str(output), *flags)

    def wait_for_more(shards: int) -> None:
        wait_until(lambda: len(list(output.glob("*.parquet"))) > shards)

    for shards in (5, 15, 25):
        with process(*command) as killed:
            wait_for_more(shards)
            killed.kill()
    with process(*command) as last:
        assert last.wait(120) == 0
    assert bulk(tiny_catalog, "embed", source, undisturbed).exit_code == 0
    assert len(rows(output)) == 200
    check_equal(rows(output), rows(undisturbed))


def check_equal(ours: dict[str, dict[str, object]], theirs: dict[str, dict[str, object]]) -> None:
    """Equal rows, but for the last digits of vectors, which depend on the batch."""
    assert ours.keys() == theirs.keys()
    for name, row in ours.items():
        assert row["error"] == theirs[name]["error"]
        if row["error"] is None:
            assert np.allclose(row["embedding"], theirs[name]["embedding"], atol=1e-5)  # type: ignore[arg-type]


def test_parquet_and_tars_are_sources(
    tiny_catalog: Path, tmp_path: Path, jpegs: dict[str, bytes]
) -> None:
    source = tmp_path / "source"
    source.mkdir()
    images = [*jpegs.values(), b"no image", None]
    cells = [{"bytes": image, "path": "x"} for image in images]
    table = pa.table({"id": [f"row-{n}" for n in range(len(cells))], "image": cells})
    pq.write_table(table, source / "rows.parquet", row_group_size=4)
    with tarfile.open(source / "shard-0.tar", "w") as archive:
        for name, image in (*jpegs.items(), ("0001", b"")):
            member = tarfile.TarInfo(f"{name}.jpg")
            member.size = len(image)
            archive.addfile(member, io.BytesIO(image))
        archive.addfile(tarfile.TarInfo("0001.cls"))
    output = tmp_path / "out"
    result = bulk(tiny_catalog, "embed", source, output, "--option", "normalize=false")
    assert "11 images in 3 shards, 3 failed" in result.output
    found = rows(output)
    assert {name for name, row in found.items() if row["error"]} == {
        "row-4", "row-5", f"{source}/shard-0.tar/0001.jpg"}  # fmt: skip
    one, two = found["row-0"], found[f"{source}/shard-0.tar/astronaut.jpg"]
    assert np.allclose(one["embedding"], two["embedding"], atol=1e-4)  # type: ignore[arg-type]


def test_shards_change_with_their_files(folder: Path) -> None:
    before = list_shards(str(folder), 4)
    assert [len(shard.paths) for shard in before] == [4, 4, 2]
    assert list_shards(str(folder), 4) == before
    assert Shard.from_json(before[0].to_json()) == before[0]
    (folder / "2/coffee.jpg").write_bytes(b"another image")
    names = [{shard.name for shard in shards} for shards in (before, list_shards(str(folder), 4))]
    assert len(names[0] & names[1]) == 2
    (folder / "0/astronaut.jpg").unlink()
    assert next(iter(read_shard(before[0]))) == (str(folder / "0/astronaut.jpg"), None)


def test_wrong_use_is_told(tiny_catalog: Path, folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    for arguments, says in (
        (("classify", tmp_path / "none", output), "not found"),
        (("classify", folder, output, "--model", "none"), "no model 'none'"),
        (("classify", folder, output, "--option", "top_k=0"), "greater than or equal to 1"),
        (("embed", folder, output, "--option", "output=tokens"), "does not fit into a column"),
    ):
        result = bulk(tiny_catalog, *arguments)
        assert result.exit_code == 2, result.output
        assert says in " ".join(result.output.split())
    assert not output.exists()


def test_a_table_without_images_is_told(tiny_catalog: Path, tmp_path: Path) -> None:
    pq.write_table(pa.table({"number": [1, 2]}), tmp_path / "numbers.parquet")
    result = bulk(tiny_catalog, "classify", tmp_path / "numbers.parquet", tmp_path / "out")
    assert result.exit_code == 2, result.output
    assert "image" in result.output


def test_a_folder_of_a_former_version_is_continued_by_its_job_only(tmp_path: Path) -> None:
    job = Job(task="embed", model="tiny", source="photos", output=str(tmp_path))
    Results(job).open()
    former = (tmp_path / "_job.json").rename(tmp_path / "job.json")
    with pytest.raises(SourceFormatError, match="another job"):
        Results(replace(job, model="conv")).open()
    assert former.exists()
    assert Results(job).open() == set()
    assert [path.name for path in tmp_path.iterdir()] == ["_job.json"]


def test_results_of_two_versions_of_a_model_are_told_apart(
    tiny_catalog: Path, folder: Path, tmp_path: Path
) -> None:
    job = Job(task="embed", model="tiny", source=str(folder), output=str(tmp_path / "out"))
    results = Results(job)
    results.open()
    settings = Settings(catalog=str(tiny_catalog), device="cpu")
    runner = ShardRunner(settings, job)
    shards = list_shards(str(folder), 4)
    assert [runner.run(shard) for shard in shards] == [(4, 0), (4, 1), (2, 0)]
    runner.close()
    results.check_digests()
    part = next((tmp_path / "out").glob("*.parquet"))
    table = pq.read_table(part)
    changed = {**table.schema.metadata, b"model_digest": b"sha256:other"}
    pq.write_table(table.replace_schema_metadata(changed), part)
    with pytest.raises(SourceFormatError, match="versions of"):
        results.check_digests()
