"""`qvl-serve` and `qvl serve`: an OpenAI-compatible server over any backend."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import fields
from typing import TYPE_CHECKING

import typer

from qvl.cli.expand import expand
from qvl.cli.serve_settings import ServeSettings, source_of_value
from qvl.errors import ConfigError, MissingDependencyError

if TYPE_CHECKING:
    from qvl.server.pool_admin import Source
    from qvl.types import JsonObject


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""
    app.command("serve", context_settings={"default_map": _from_config_file()})(serve)


def main(args: Sequence[str] | None = None) -> None:
    """Run `qvl-serve`."""
    from qvl.cli import SingleCommand, one_line_errors
    from qvl.cli.terminal import open_streams

    open_streams()
    app = typer.Typer(add_completion=False, rich_markup_mode="rich", pretty_exceptions_enable=False)
    try:
        with one_line_errors():
            settings = {"help_option_names": ["-h", "--help"], "default_map": _from_config_file()}
            app.command(cls=SingleCommand, context_settings=settings)(serve)
            app(args=args, prog_name="qvl-serve", standalone_mode=True)
    except typer.Exit as exc:
        # Outside of any group typer's Exit becomes the process's own.
        sys.exit(exc.exit_code)


def _from_config_file() -> dict[str, object]:
    """Return the `[serve]` table of qvl's config file by option name; raise ConfigError for an unknown name."""
    from qvl import config

    table = {name.replace("-", "_"): value for name, value in config.load().serve.items()}
    known = {field.name for field in fields(ServeSettings)}
    for name in table.keys() - known:
        raise config.unknown_setting(name, known, "serve")
    return table


@expand
def serve(ctx: typer.Context, settings: ServeSettings) -> None:
    """Serve an OpenAI-compatible API over any backend, with a cache.

    Options come from arguments, then the environment, then the table [bold]serve[/bold] of the config file.
    """
    try:
        from qvl.server.app import create_app
        from qvl.server.auth import LOOPBACK, KeyRing, check_open
        from qvl.server.run_uvicorn import bind, make_server, run_server
        from qvl.server.tracing import exporting
    except ModuleNotFoundError as exc:
        from qvl.suggest import install_line

        raise MissingDependencyError(f"qvl-serve needs the package {exc.name!r}", hint=install_line("server")) from exc
    from qvl.cli.banner import print_banner, shown_host
    from qvl.pipeline.async_pipeline import AsyncPipeline

    check_open(settings.host, KeyRing(settings.api_keys, settings.api_key_file), allowed=settings.allow_unauthenticated)
    configure_logs(settings.log_level, settings.log_format)
    server_settings = settings.server_settings(ctx)
    endpoints = _endpoint_source(ctx, settings)
    model, options = _backend(settings, endpoints)
    traces = exporting(settings.otlp_traces_endpoint)
    listener = bind(settings.host, settings.port)
    try:
        pipeline = AsyncPipeline(
            model,
            cache=settings.cache,
            cache_mode=settings.cache_mode,  # type: ignore[arg-type]
            cache_ttl=settings.cache_ttl,
            namespace=settings.namespace,
            media=server_settings.media,
            **options,
        )
        server = make_server(
            create_app(pipeline, server_settings, tracer_provider=traces),
            tls_cert=settings.tls_cert,
            tls_key=settings.tls_key,
            root_path=settings.root_path,
            header_timeout=settings.header_timeout,
        )
        server.core.endpoint_source = endpoints
        if settings.exit_on_engine_death:
            server.exit_on_death()
        scheme = "https" if settings.tls_cert else "http"
        address = f"{scheme}://{shown_host(settings.host)}:{listener.getsockname()[1]}"
        server.when_settled = lambda: print_banner(server.core, address)
        if settings.host not in LOOPBACK and not server.core.keys.required:
            print("qvl-serve: WARNING: anybody who can reach this address can use it", file=sys.stderr)
        print(f"loading {server.core.names[0]}; {address}/ready tells when it is done", file=sys.stderr, flush=True)
        run_server(server, listener)
    finally:
        listener.close()
        if traces is not None:
            traces.shutdown()


def _endpoint_source(ctx: typer.Context, settings: ServeSettings) -> Source | None:
    """Return the function that reloads the endpoint list; None if command line or environment set it."""
    from qvl.server.pool_admin import source_of

    configured = source_of_value(ctx, "base_url") == "DEFAULT_MAP"
    if settings.base_url_file and settings.base_url and not configured:
        raise ConfigError("--base-url and --base-url-file exclude each other", hint="name all endpoints in the file")
    return source_of(settings.base_url_file, configured=configured)


def _backend(settings: ServeSettings, endpoints: Source | None) -> tuple[str | None, JsonObject]:
    """Return (model, backend options) for the pipeline; with --replicas they are of the ray backend."""
    from qvl.pipeline.async_pipeline import TINY_NOTICE

    options = settings.backend_options()
    if endpoints is not None:
        options.setdefault("base_url", endpoints())
    elif settings.base_url:
        options.setdefault("base_url", list(settings.base_url))
    if settings.replicas is None:
        if settings.devices is not None or settings.ray_address is not None:
            raise ConfigError("--devices and --ray-address need --replicas", hint="--replicas 8 --devices npu")
        return settings.model, options
    if settings.model is None:
        print(TINY_NOTICE, file=sys.stderr)
    options["devices"] = settings.devices or options.pop("device", "auto")
    options |= {"replicas": settings.replicas, "ray_address": settings.ray_address}
    options.setdefault("drain_timeout", settings.drain_timeout)
    return f"ray:{settings.model or ''}", options


def configure_logs(level: str, form: str) -> None:
    """Log JSON lines or text to stderr; the pipeline's log line per request is off, as the server has its own."""
    import logging

    from qvl.log import configure

    if level.lower() not in ("debug", "info", "warning", "error"):
        raise ConfigError(f"invalid --log-level {level!r}", hint="debug, info, warning or error")
    if form not in ("json", "text"):
        raise ConfigError(f"invalid --log-format {form!r}", hint="json or text")
    configure(level=level, json=form == "json")
    if level.lower() != "debug":
        logging.getLogger("qvl.pipeline").setLevel(logging.WARNING)


if __name__ == "__main__":
    main()
