"""The `vitrail` command. Heavy imports wait until a command needs them."""

import typer

from service.cli import client, fit, health, models, retrieval, serve

app = typer.Typer(
    help="Serve vision transformers: any published checkpoint in, exact output out.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
for command in (serve.serve, serve.gateway, serve.worker, health.health):
    app.command(command.__name__)(command)
app.command("fit")(fit.fit)
app.add_typer(models.app, name="models")
for task in (client.classify, client.zero_shot, client.segment, retrieval.embed, retrieval.search):
    app.command(task.__name__.replace("_", "-"))(task)


def main() -> None:
    """Entry point."""
    app()
