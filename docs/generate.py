"""Reference tables, generated from the code while the site is built.

A page asks for a table with a line `<!-- generate: NAME -->`, where NAME is a key of `TABLES`.
mkdocs calls `on_page_markdown` for each page. Nothing here needs a GPU or the network.
"""

import ast
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import typer
from prometheus_client import CollectorRegistry

from models.catalog import load_catalog
from models.checkpoints.formats import checkpoint_formats
from models.tasks.table import tasks
from service.cli import app as command_line
from service.errors import BY_SLUG
from service.gateway.app import create_app
from service.metrics import Metrics
from service.remote.backend import RemoteBackend
from service.remote.metrics import RemoteMetrics
from service.settings import Settings

ROOT = Path(__file__).parents[1]
MARKER = re.compile(r"^<!-- generate: ([a-z-]+) -->$", re.MULTILINE)
SERVICE_END = "\n}\n"
MIB = 2**20


def on_page_markdown(markdown: str, **_: Any) -> str:
    """mkdocs' hook: replace each marker by its table.

    Raises:
        KeyError: a marker names no table; the build fails.
    """
    return MARKER.sub(lambda match: TABLES[match[1]](), markdown)


def settings() -> str:
    """Every setting of `service/settings.py`: environment variable, default, meaning."""
    rows = [
        (_code(f"VITRAIL_{name.upper()}"), _default(field.default), field.description or "")
        for name, field in Settings.model_fields.items()
    ]
    return _table(("environment variable", "default", "meaning"), rows)


def metrics() -> str:
    """Every metric that the sources declare: name, type, labels, meaning.

    Read from the sources: gauges such as those of a GPU exist only where there is one.
    """
    rows = []
    for path in sorted((ROOT / "service").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and (row := _metric(node)) is not None:
                rows.append(row)
    return _table(("metric", "type", "labels", "meaning"), sorted(rows))


def routes() -> str:
    """Every route of the OpenAPI document, by its tag."""
    document = _openapi()
    by_tag: dict[str, list[str]] = {}
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            tag = operation.get("tags", ["other"])[0]
            by_tag.setdefault(tag, []).append(_route(method, path, operation))
    return "\n\n".join(f"## {tag}\n\n" + "\n\n".join(rows) for tag, rows in by_tag.items())


def task_table() -> str:
    """Every task: its summary, options and outputs."""
    return "\n\n".join(_task(name) for name in tasks())


def formats() -> str:
    """Every checkpoint format: its name and the first paragraph of its module."""
    rows = [
        (_code(item.NAME), (item.__doc__ or "").partition("\n\n")[0].strip())
        for item in checkpoint_formats()
    ]
    return _table(("format", "what it is"), rows)


def errors() -> str:
    """Every kind of error: problem type, HTTP status, gRPC status."""
    rows = [
        (_code(f"urn:vitrail:problem:{slug}"), str(error.status), _code(error.grpc), error.title)
        for slug, error in sorted(BY_SLUG.items(), key=lambda item: item[1].status)
    ]
    return _table(("type", "HTTP", "gRPC", "title"), rows)


def catalog(name: str) -> str:
    """Every model of a built-in catalog."""
    content = load_catalog(name)
    rows = [
        (
            _code(model.name),
            model.task,
            model.description,
            model.paper.removeprefix("arXiv "),
            model.licence,
            content.trunks[model.trunk].origin,
        )
        for model in content.models.values()
    ]
    return _table(("model", "task", "what it is", "arXiv", "licence", "publisher"), rows)


def grpc_methods(proto: str) -> str:
    """Every method of a .proto file's service, with the comment above it."""
    text = (ROOT / "proto" / proto).read_text(encoding="utf-8")
    pattern = r"((?:^  //.*\n)*)^  rpc (\w+)\((.*?)\)\s+returns \((.*?)\);"
    rows = [
        (_code(name), _code(request), _code(response), comment.replace("//", ""))
        for comment, name, request, response in re.findall(pattern, text, re.MULTILINE)
    ]
    return _table(("method", "request", "response", "meaning"), rows)


def grpc_messages() -> str:
    """The messages of `vision.proto`, as they stand there."""
    text = (ROOT / "proto/vitrail/v1/vision.proto").read_text(encoding="utf-8")
    return f"```protobuf\n{text.partition(SERVICE_END)[2].strip()}\n```"


def commands() -> str:
    """Every command of `vitrail` with its arguments and options."""
    return "\n\n".join(_commands(typer.main.get_command(command_line), "vitrail"))


def request_path() -> str:
    """The map at the top of `service/__init__.py`."""
    source = (ROOT / "service/__init__.py").read_text(encoding="utf-8")
    docstring = ast.get_docstring(ast.parse(source)) or ""
    return f"```text\n{docstring}\n```"


TABLES: dict[str, Callable[[], str]] = {
    "settings": settings,
    "metrics": metrics,
    "routes": routes,
    "tasks": task_table,
    "formats": formats,
    "errors": errors,
    "catalog-demo": lambda: catalog("demo"),
    "catalog-hub": lambda: catalog("hub"),
    "catalog-published": lambda: catalog("published"),
    "grpc-vision": lambda: grpc_methods("vitrail/v1/vision.proto"),
    "grpc-messages": grpc_messages,
    "grpc-open-inference": lambda: grpc_methods("inference/open_inference.proto"),
    "commands": commands,
    "request-path": request_path,
}

METRIC_TYPES = {
    "Counter": "counter",
    "Gauge": "gauge",
    "GaugeMetricFamily": "gauge",
    "Histogram": "histogram",
}


def _metric(call: ast.Call) -> tuple[str, ...] | None:
    """A metric's declaration as a row, or None if the call declares none."""
    kind = METRIC_TYPES.get(getattr(call.func, "id", ""))
    constants = [arg.value for arg in call.args[:2] if isinstance(arg, ast.Constant)]
    if kind is None or len(constants) < 2:
        return None
    name, meaning = map(str, constants)
    keywords = {keyword.arg: keyword.value for keyword in call.keywords}
    labels = call.args[2] if len(call.args) > 2 else keywords.get("labels")
    names = ast.literal_eval(labels) if labels is not None else ()
    suffix = "_total" if kind == "counter" else ""
    return _code(name + suffix), kind, ", ".join(map(_code, names)), meaning


def _openapi() -> dict[str, Any]:
    """The OpenAPI document, of an application whose backend is never started."""
    registry = CollectorRegistry()
    options = Settings(workers=("127.0.0.1:1",))
    backend = RemoteBackend(options, RemoteMetrics(registry))
    return create_app(options, backend, Metrics(registry)).openapi()


def _route(method: str, path: str, operation: dict[str, Any]) -> str:
    parts = [f"### `{method.upper()} {path}`", operation.get("description", "").strip()]
    rows = [
        (_code(item["name"]), item["in"], *_schema(item.get("schema", {})))
        for item in operation.get("parameters", ())
    ]
    if rows:
        parts.append(_table(("parameter", "in", "type", "default", "meaning"), rows))
    if body := operation.get("requestBody", {}).get("content"):
        parts.append("Body: " + ", ".join(map(_code, body)) + ".")
    return "\n\n".join(part for part in parts if part)


def _task(name: str) -> str:
    task = tasks()[name]
    schema = task.options.model_json_schema()
    options = [(_code(key), *_schema(field)) for key, field in schema["properties"].items()]
    outputs = [
        (
            _code(output.name),
            _code(output.datatype),
            _code("[" + ", ".join("?" if n < 0 else str(n) for n in output.shape) + "]"),
            "on request" if output.on_request else "always",
        )
        for output in task.outputs
    ]
    bodies = ", ".join(_code(body.media_type) for body in task.bodies)
    parts = [
        f"## {name}",
        task.summary,
        f"Takes: {', '.join(task.modalities) or 'options only'}."
        + (f" Other response bodies: {bodies}." if bodies else ""),
        _table(("option", "type", "default", "meaning"), options),
        _table(("output", "data type", "shape", "in an answer"), outputs),
    ]
    return "\n\n".join(parts)


def _schema(field: dict[str, Any]) -> tuple[str, str, str]:
    """Type with bounds, default and description of a JSON schema's field."""
    choices = [item for item in field.get("anyOf", [field]) if item.get("type") != "null"]
    default = "" if field.get("default") is None else _code(_json(field["default"]))
    return " or ".join(map(_type, choices)), default, field.get("description", "")


def _type(schema: dict[str, Any]) -> str:
    if "enum" in schema:
        return ", ".join(_code(str(value)) for value in schema["enum"])
    text = str(schema.get("type", "any"))
    if text == "array":
        low, high = schema.get("minItems"), schema.get("maxItems")
        bounds = f" ({low or 0} to {high})" if high is not None else ""
        return f"list of {_type(schema.get('items', {}))}{bounds}"
    low = schema.get("minimum", schema.get("exclusiveMinimum"))
    high = schema.get("maximum", schema.get("exclusiveMaximum"))
    if low is not None and high is not None:
        return f"{text}, {low} to {high}"
    return text if low is None else f"{text}, from {low}"


def _json(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _commands(command: Any, name: str) -> Iterator[str]:
    children = getattr(command, "commands", {})
    if not children:
        yield f"## `{name}`\n\n{(command.help or '').strip()}\n\n{_parameters(command.params)}"
    for child, subcommand in children.items():
        yield from _commands(subcommand, f"{name} {child}")


def _parameters(parameters: Iterable[Any]) -> str:
    rows = []
    for parameter in parameters:
        if getattr(parameter, "hidden", False):
            continue
        is_argument = parameter.param_type_name == "argument"
        flag = parameter.name.upper() if is_argument else ", ".join(parameter.opts)
        default = "" if parameter.default in (None, False, ()) else _code(str(parameter.default))
        meaning = getattr(parameter, "help", None) or ""
        if variable := getattr(parameter, "envvar", None):
            meaning = f"{meaning} Environment: `{variable}`."
        rows.append((_code(flag), "required" if parameter.required else default, meaning))
    return _table(("argument or option", "default", "meaning"), rows)


def _default(value: object) -> str:
    if isinstance(value, int) and value >= MIB and value % MIB == 0:
        return f"`{value}` ({value // MIB} MiB)"
    return "" if value == () else _code(_json(value))


def _code(text: str) -> str:
    return f"`{text}`" if text else ""


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; columns without any content are left out."""
    content = [[_cell(cell) for cell in row] for row in rows]
    kept = [column for column in range(len(header)) if any(row[column] for row in content)]
    lines = [[header[column] for column in kept], ["---"] * len(kept)]
    lines += [[row[column] for column in kept] for row in content]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
