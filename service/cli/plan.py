"""`vitrail plan`: how many devices a load needs, and what latency to expect."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from service.cli.starting import report_errors
from service.cli.tables import table_console

if TYPE_CHECKING:
    from service.planning.placement import Device


def plan(
    load: Annotated[
        str,
        typer.Argument(
            help="A TOML file of trunks with `rate` and `pass_ms`, or the URL of a server, whose "
            "measured passes are then printed as such a file."
        ),
    ],
    p99_ms: Annotated[
        float,
        typer.Option(min=0.1, help="Milliseconds in the queue and in a pass, for 99 % of images."),
    ] = 200.0,
    lanes: Annotated[
        int, typer.Option(min=1, max=64, help="Lanes of a CPU (VITRAIL_STREAMS); 1 for a GPU.")
    ] = 1,
    memory_mb: Annotated[float, typer.Option(min=0, help="Of a device; 0 for any.")] = 0.0,
    images: Annotated[
        int, typer.Option(min=0, max=1_000_000, help="Simulated on each device; 0 for none.")
    ] = 10_000,
    admin_key: Annotated[
        str | None, typer.Option(envvar="VITRAIL_ADMIN_KEY", help="Of the server.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Plan devices for a load: placement, utilization, predicted and simulated latency.

    The prediction is a queueing model's; the simulation runs the server's own
    scheduler in virtual time. Decoding, the network and other requests' bursts
    are not in it.
    """
    from service.planning.load import read_loads
    from service.planning.measured import measured_loads
    from service.planning.placement import place

    with report_errors():
        if load.startswith(("http://", "https://")):
            typer.echo(measured_loads(load, admin_key), nl=False)
            return
        devices = place(
            read_loads(Path(load)), p99_ms / 1e3, lanes=lanes, memory=int(memory_mb * 1e6)
        )
        rows = [row for device in devices for row in _rows(device, lanes, images)]
    if as_json:
        typer.echo(json.dumps({"devices": sum(d.count for d in devices), "trunks": rows}))
        return
    _print(rows)
    typer.echo(f"\n{sum(device.count for device in devices)} devices")
    late = [row["trunk"] for row in rows if row.get("simulated_p99_ms", 0) > p99_ms]
    if late:
        typer.echo(f"simulated above {p99_ms:g} ms: {', '.join(late)}; plan with a lower --p99-ms")


def _rows(device: "Device", lanes: int, images: int) -> list[dict[str, Any]]:
    from service.planning.simulation import simulate

    rows: list[dict[str, Any]] = []
    for load, prediction in zip(device.loads, device.predictions, strict=True):
        rows.append(
            {
                "trunk": load.name,
                "devices": device.count,
                "beside": len(device.loads) - 1,
                "rate": round(load.rate, 3),
                "utilization": round(device.utilization / lanes, 3),
                "batch": round(prediction.batch, 2),
                "p50_ms": round(prediction.p50 * 1e3, 1),
                "p99_ms": round(prediction.p99 * 1e3, 1),
                "memory_mb": round(load.memory / 1e6),
            }
        )
    if images:
        seen = simulate(device.loads, images=images, lanes=lanes)
        for row, simulated in zip(rows, seen, strict=True):
            if simulated.latencies:
                row["simulated_p50_ms"] = round(simulated.quantile(0.5) * 1e3, 1)
                row["simulated_p99_ms"] = round(simulated.quantile(0.99) * 1e3, 1)
    return rows


def _print(rows: list[dict[str, Any]]) -> None:
    table = Table(box=None, padding=(0, 1, 0, 0))
    columns = {
        "trunk": "trunk",
        "devices": "devices",
        "beside": "beside",
        "rate": "images/s each",
        "utilization": "busy",
        "batch": "batch",
        "p50_ms": "p50 ms",
        "p99_ms": "p99 ms",
        "simulated_p50_ms": "simulated p50",
        "simulated_p99_ms": "p99",
        "memory_mb": "MB",
    }
    for name, title in columns.items():
        table.add_column(title, justify="left" if name == "trunk" else "right", no_wrap=True)
    for row in rows:
        table.add_row(
            *(
                f"{row[name]:.0%}" if name == "utilization" else str(row.get(name, ""))
                for name in columns
            )
        )
    table_console().print(table)
