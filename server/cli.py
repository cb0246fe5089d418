"""The command line: `attndrop serve`, `gateway`; from the pruning library `plan`, `evaluate`,
`heal`, `report`, `export`.

Options are made from the settings, so that a setting is described once.
"""

from __future__ import annotations

import inspect
import logging
import sys
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from typing import Annotated, Any, TypeVar, get_origin

import typer
from pydantic import ValidationError
from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings
from rich.console import Console
from rich.logging import RichHandler
from rich.table import Table

from pruning.cli import USER_ERRORS as PLAN_ERRORS
from pruning.cli import evidence_of, plan_app, progress_bars
from pruning.evaluation_cli import evaluate_command
from pruning.export.cli import export_command
from pruning.heal_cli import heal_command
from pruning.quantised import QuantisationError
from pruning.report.cli import report_command
from pruning.selection import DEFAULT_STRATEGY
from pruning.variants import VariantError
from server import __version__
from server.config import Settings
from server.engine.assembly import EngineConfigError
from server.engine.detokenize import UnknownDecoderError
from server.gateway.settings import GatewaySettings
from server.gateway.start import GatewayError, StartedGateway, start_gateway
from server.lifecycle import AddressError, Server, bind
from server.startup import SettingsError, Started, start

USER_ERRORS = (
    *PLAN_ERRORS,
    VariantError,
    EngineConfigError,
    QuantisationError,
    UnknownDecoderError,
    SettingsError,
    AddressError,
    GatewayError,
)

app = typer.Typer(
    name="attndrop",
    help="Serve a language model and attention-pruned variants of it from one copy of the weights.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
app.add_typer(plan_app, name="plan")
app.command("export")(export_command)
app.command("evaluate")(evaluate_command)
app.command("heal")(heal_command)
app.command("report")(report_command)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool,
        typer.Option(
            "--version",
            help="Print the version and leave.",
            callback=_print_version,
            is_eager=True,
        ),
    ] = False,
) -> None:
    """What all commands have in common."""


def _with_options_of(
    settings: type[BaseSettings],
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give `function(**given)` one option for every setting; what is not given is None."""

    def give(function: Callable[..., None]) -> Callable[..., None]:
        parameters = [_option(name, field) for name, field in settings.model_fields.items()]
        function.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        function.__annotations__ = {p.name: p.annotation for p in parameters}
        return function

    return give


def _option(name: str, field: FieldInfo) -> inspect.Parameter:
    return inspect.Parameter(
        name,
        inspect.Parameter.KEYWORD_ONLY,
        default=None,
        annotation=Annotated[_option_type(field), typer.Option(help=_option_help(name, field))],
    )


def _option_type(field: FieldInfo) -> Any:
    """Return the type the command line parses; `Settings` then checks the value itself."""
    if get_origin(field.annotation) is tuple:
        return list[str] | None
    return bool | None if field.annotation is bool else str | None


def _option_help(name: str, field: FieldInfo) -> str:
    default = f" [default: {field.default}]" if field.default not in (None, (), "", False) else ""
    return f"{field.description}{default}"


@app.command()
@_with_options_of(Settings)
def serve(**given: Any) -> None:
    """Serve a model over HTTP."""
    settings = _settings(Settings, given)
    _log_to_stderr(settings.log_level)
    server: Server | None = None

    def on_death() -> None:
        if server is not None:
            server.engine_died()

    try:
        address = bind(settings.host, settings.port)  # a port that is taken is said at once
        with progress_bars() as progress:
            started = _on_passing_thread(lambda: start(settings, progress, on_death))
    except USER_ERRORS as error:
        raise _fail(str(error)) from None
    server = Server(
        started.app,
        started.service,
        started.engine,
        drain_timeout=settings.drain_timeout,
        when_up=lambda url: _greet(url, started),
    )
    server.run([address])
    raise typer.Exit(server.exit_status)


@app.command()
@_with_options_of(GatewaySettings)
def gateway(**given: Any) -> None:
    """Serve the same API in front of other servers, a pool of them for each variant."""
    settings = _settings(GatewaySettings, given)
    _log_to_stderr(settings.log_level)
    try:
        address = bind(settings.host, settings.port)
        started = start_gateway(settings)
    except USER_ERRORS as error:
        raise _fail(str(error)) from None
    server = Server(
        started.app,
        started.front,
        started.worker,
        drain_timeout=settings.drain_timeout,
        when_up=lambda url: _greet_gateway(url, started),
    )
    server.run([address])
    raise typer.Exit(server.exit_status)


S = TypeVar("S", bound=BaseSettings)


def _settings(kind: type[S], given: Mapping[str, Any]) -> S:
    """Return the settings that options and environment make; a mistake ends the program."""
    try:
        return kind(**{name: value for name, value in given.items() if value not in (None, [])})
    except ValidationError as error:
        raise _fail(_setting_problem(error)) from None


def _on_passing_thread(work: Callable[[], Started]) -> Started:
    """Return what `work` returns, computed on a thread that has ended by then.

    A thread that has run torch on a CPU keeps a team of OpenMP workers for as long as it lives.
    With the engine's own team there would be more of them than cores, and OpenMP then lets
    workers sleep between operations: a decode step took 66 ms with both teams and 37 ms with one.
    """
    future: Future[Started] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:  # noqa: BLE001 - raised again by result()
            future.set_exception(error)

    thread = threading.Thread(target=run, name="start", daemon=True)
    thread.start()
    started = future.result()
    thread.join()
    return started


def _greet(url: str, started: Started) -> None:
    """Say where the service is, what it offers and how to try it."""
    console = Console(highlight=False, soft_wrap=True)
    service, plan = started.service, started.plan
    table = Table(box=None, pad_edge=False)
    for heading in ("variant", "drops attention of layers", "KV bytes/token", "KV capacity"):
        table.add_column(heading, justify="left" if heading[0] in "vd" else "right")
    for info in service.engine.describe():
        dropped = ", ".join(map(str, info.dropped_layers)) or "none"
        default = " (default)" if info.name == service.default_variant else ""
        table.add_row(
            info.name + default,
            f"{dropped}  ({len(info.dropped_layers)} of {plan.model.layers})"
            + (f"; MLPs of {', '.join(map(str, info.dropped_mlps))}" if info.dropped_mlps else ""),
            f"{info.kv_bytes_per_token:,}",
            f"{info.capacity_tokens:,} tokens",
        )
    console.print(f"\nattndrop {__version__} serves {service.model_name} at {url}")
    console.print(f"plan {plan.id} ({plan.strategy}, {started.plan_origin})")
    for name, other in service.plan_ids.items():
        if other != plan.id:
            console.print(f"  {name}: plan {other}")
    console.print()
    console.print(table)
    console.print(f"\npruned, {evidence_of(plan) or 'its quality was not measured'}")
    if plan.strategy == DEFAULT_STRATEGY:
        console.print(
            "for more quality at the same speed, give minutes instead of seconds once:\n"
            f"  attndrop plan --model {started.model} --strategy greedy --substitutes linear "
            "--output plan.json\n"
            "  and serve with --plan plan.json"
        )
    console.print(
        f"\ncurl {url}/v1/completions -H 'Content-Type: application/json' "
        f"-H 'X-Model-Variant: pruned' "
        '-d \'{"prompt": "The capital of France is", "max_tokens": 16, "temperature": 0}\'\n'
    )


def _greet_gateway(url: str, started: StartedGateway) -> None:
    """Say where the gateway is and what is behind it."""
    console = Console(highlight=False, soft_wrap=True)
    front = started.front
    console.print(f"\nattndrop {__version__} gateway serves {front.model_name} at {url}\n")
    table = Table(box=None, pad_edge=False)
    for heading in ("variant", "upstreams"):
        table.add_column(heading)
    for name, pool in front.pools.items():
        default = " (default)" if name == front.default_variant and front.split is None else ""
        table.add_row(name + default, "  ".join(upstream.url for upstream in pool.upstreams))
    console.print(table)


def _log_to_stderr(level: str) -> None:
    handler = RichHandler(console=Console(stderr=True), show_path=False, log_time_format="[%X]")
    logging.basicConfig(level=level.upper(), format="%(message)s", handlers=[handler], force=True)
    for library in ("httpx", "uvicorn"):  # what matters of theirs is a warning or worse
        logging.getLogger(library).setLevel(logging.WARNING)


def _setting_problem(error: ValidationError) -> str:
    problem = error.errors()[0]
    option = "--" + str(problem["loc"][0]).replace("_", "-") if problem["loc"] else "settings"
    message = str(problem["msg"]).removeprefix("Value error, ")
    return message if option in message else f"{option}: {message}"


def _fail(message: str) -> typer.Exit:
    typer.echo(f"error: {message}", err=True)
    return typer.Exit(1)


if __name__ == "__main__":
    sys.exit(app())
