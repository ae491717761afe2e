"""`vitrail keys`: create, list and revoke keys of a server's file of hashed keys."""

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated

import typer
from pydantic import ValidationError

from service.cli.starting import report_errors
from service.key_file import SCOPES, create_key, read_keys, revoke_key

app = typer.Typer(
    help="API keys with scopes, quotas and expiry, hashed in a file.", no_args_is_help=True
)

File = Annotated[
    Path, typer.Option("--file", envvar="VITRAIL_KEYS_FILE", help="The server's file of keys.")
]


@app.command()
def create(
    file: File,
    scope: Annotated[
        list[str], typer.Option(help=f"One of {', '.join(SCOPES)}; repeat it for several.")
    ],
    name: Annotated[str, typer.Option(help="A note on who has the key.")] = "",
    expires_in_days: Annotated[
        float | None, typer.Option(min=0, help="Days until the key expires.")
    ] = None,
    requests_per_s: Annotated[float | None, typer.Option(help="Most requests per second.")] = None,
    images_per_s: Annotated[float | None, typer.Option(help="Most images per second.")] = None,
) -> None:
    """Create a key and print it. It is stored nowhere: the file has its SHA-256 digest."""
    with report_errors():
        try:
            expires = None
            if expires_in_days is not None:
                expires = datetime.now(UTC) + timedelta(days=expires_in_days)
            record, key = create_key(
                file,
                scope,
                name=name,
                expires=expires,
                requests_per_s=requests_per_s,
                images_per_s=images_per_s,
            )
        except (ValidationError, OverflowError) as error:
            raise typer.BadParameter(_first(error)) from error
    typer.echo(f"key {record.id} in {file}; it is shown only now:", err=True)
    typer.echo(key)


@app.command(name="list")
def list_keys(file: File) -> None:
    """List the keys, without the keys themselves."""
    with report_errors():
        records = read_keys(file)
    for record in records:
        quotas = [
            f"{per_s:g} {unit}/s"
            for unit, per_s in (
                ("requests", record.requests_per_s),
                ("images", record.images_per_s),
            )
            if per_s is not None
        ]
        until = f"until {record.expires:%Y-%m-%d %H:%M}" if record.expires else "no expiry"
        columns = [record.id, ",".join(record.scopes), "expired" if record.expired else until]
        typer.echo("  ".join([*columns, *quotas, record.name]).rstrip())


@app.command()
def revoke(key_id: Annotated[str, typer.Argument(metavar="ID")], file: File) -> None:
    """Remove a key. Servers that watch the file refuse it from the next request on."""
    with report_errors():
        revoke_key(file, key_id)
    typer.echo(f"revoked {key_id}")


def _first(error: ValidationError | OverflowError) -> str:
    if isinstance(error, OverflowError):
        return str(error)
    item = error.errors(include_url=False)[0]
    return f"{'.'.join(map(str, item['loc']))}: {item['msg']}"
