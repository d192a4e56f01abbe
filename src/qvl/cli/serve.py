"""`qvl-serve` and `qvl serve`: an OpenAI-compatible server over any backend."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Sequence
from dataclasses import fields
from typing import TYPE_CHECKING

import typer

from qvl.cli.expand import expand
from qvl.cli.options import read_thresholds
from qvl.cli.serve_settings import ServeSettings, source_of_value
from qvl.errors import ConfigError, MissingDependencyError, QvlError

if TYPE_CHECKING:
    from qvl.server.pool_admin import Source
    from qvl.server.settings import ServerSettings
    from qvl.server.workers import ServerWorker
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
        from qvl.server.auth import KeyRing, check_open
        from qvl.server.run_uvicorn import bind
        from qvl.server.workers import Supervisor, bind_shared, check_divisible
    except ModuleNotFoundError as exc:
        from qvl.suggest import install_line

        raise MissingDependencyError(f"qvl-serve needs the package {exc.name!r}", hint=install_line("server")) from exc

    check_open(settings.host, KeyRing(settings.api_keys, settings.api_key_file), allowed=settings.allow_unauthenticated)
    configure_logs(settings.log_level, settings.log_format)
    server_settings = settings.server_settings(ctx)
    endpoints = _endpoint_source(ctx, settings)
    # Ray ends a process that has lost its cluster, or can no longer join another: it is a worker, and is replaced.
    if settings.workers == 1 and (settings.replicas is None or not hasattr(os, "fork")):
        listener = bind(settings.host, settings.port)
        try:
            _serve(settings, server_settings, endpoints, listener)
        finally:
            listener.close()
        return
    if settings.workers > 1:
        _check_workers(settings)
        check_divisible(server_settings, settings.workers)
        print(_said_limits(settings), file=sys.stderr, flush=True)
    port = settings.port

    def listen() -> socket.socket:
        nonlocal port
        listener = bind(settings.host, port, shared=True) if bound else bind_shared(settings.host, port, bind)
        port = listener.getsockname()[1]
        bound.append(port)
        return listener

    bound: list[int] = []

    def work(worker: ServerWorker) -> int:
        from qvl.cli import one_line_errors

        try:
            with one_line_errors():
                _serve(settings, server_settings, endpoints, worker.listener, worker)
        except (SystemExit, typer.Exit) as exc:
            code = exc.code if isinstance(exc, SystemExit) else exc.exit_code
            return code if isinstance(code, int) else int(code is not None)
        return 0

    if code := Supervisor(settings.workers, listen, work).run():
        sys.exit(code)


def _check_workers(settings: ServeSettings) -> None:
    """Check that several processes may serve this model.

    Raises:
        ConfigError: the model would be loaded by each of them, or the system cannot fork.
    """
    from qvl.plugins.host import PluginHost, resolve
    from qvl.plugins.names import split_model

    if not hasattr(os, "fork"):
        raise ConfigError("--workers needs a system with fork, such as Linux", hint="leave --workers out")
    if settings.cache is not None and settings.cache.partition(":")[0] == "memory":
        raise ConfigError(
            f"each of {settings.workers} workers would keep answers of its own in {settings.cache}, and find no"
            " response (previous_response_id) that another one stored",
            hint="--cache sqlite:///answers.db or redis://host for all of them, or --cache off",
            param="cache",
        )
    if settings.replicas is not None:
        if settings.ray_address is None:
            raise ConfigError(
                "--workers with --replicas needs a cluster that outlives each of them",
                hint="ray start --head, then --ray-address auto",
            )
        return
    factories = PluginHost().backends.factories
    name = "local" if settings.model is None else split_model(settings.model, factories)[0]
    if not getattr(resolve(factories[name], f"backend {name!r}"), "shareable", False):
        raise ConfigError(
            f"each of {settings.workers} workers would load a model of its own ({name})",
            hint="leave --workers out, and for several devices take --replicas N; or put qvl-serve openai:NAME"
            " --workers N in front of the engines",
            param="workers",
        )


def _said_limits(settings: ServeSettings) -> str:
    """Return the line that says how the limits of a server are kept by its workers."""
    from qvl.server.shared_limits import is_redis

    said = f"{settings.workers} workers: "
    if is_redis(settings.cache):
        return said + "they count requests together in the cache's Redis; what waits in memory is divided among them"
    return said + "each has its part of every limit; with --cache redis://... they count together"


def _serve(
    settings: ServeSettings,
    server_settings: ServerSettings,
    endpoints: Source | None,
    listener: socket.socket,
    worker: ServerWorker | None = None,
) -> None:
    """Serve in this process until a signal ends it; `worker` is its place among several."""
    from qvl.cli.banner import print_banner, shown_host
    from qvl.pipeline.async_pipeline import TINY_NOTICE, AsyncPipeline
    from qvl.server.app import create_app
    from qvl.server.auth import LOOPBACK
    from qvl.server.limits import SharedSlots
    from qvl.server.pool_admin import divided_source
    from qvl.server.run_uvicorn import make_server, run_server
    from qvl.server.shared_limits import SharedLimits, is_redis
    from qvl.server.tracing import exporting
    from qvl.server.worker_metrics import WorkerMetrics

    whole = server_settings
    if worker is not None:
        server_settings = worker.divided(whole, shared=is_redis(settings.cache))
        endpoints = divided_source(endpoints, worker.share) if endpoints else None
    speaks = worker is None or (worker.first and worker.number == 0)
    model, options = _backend(settings, endpoints)
    if speaks and settings.replicas is not None and settings.model is None:
        print(TINY_NOTICE, file=sys.stderr)
    if worker is not None and isinstance(limit := options.get("limit"), int):
        options["limit"] = max(1, worker.share(limit))
    if worker is not None and model is not None and model.startswith(("openai:", "ray:")):
        options.setdefault("quarantine", str(worker.folder / "quarantine.json"))
    traces = exporting(settings.otlp_traces_endpoint)
    try:
        pipeline = AsyncPipeline(
            model,
            cache=settings.cache,
            cache_mode=settings.cache_mode,  # type: ignore[arg-type]
            cache_ttl=settings.cache_ttl,
            namespace=settings.namespace,
            media=server_settings.media,
            calibration=settings.calibration,
            abstain=read_thresholds(settings.abstain or ()),
            **options,
        )
        pipeline.backend.refuse_missing()
        server = make_server(
            create_app(pipeline, server_settings, tracer_provider=traces),
            tls_cert=settings.tls_cert,
            tls_key=settings.tls_key,
            root_path=settings.root_path,
            header_timeout=settings.header_timeout,
        )
        core = server.core
        core.endpoint_source = endpoints
        if settings.exit_on_engine_death or (worker is not None and settings.replicas is not None):
            server.exit_on_death()
        scheme = "https" if settings.tls_cert else "http"
        address = f"{scheme}://{shown_host(settings.host)}:{listener.getsockname()[1]}"
        if pipeline.backend.shareable and settings.cache is not None and is_redis(settings.cache):
            # Fronts with the same name are one service to whoever has a key; places at the backend are this server's.
            shared = SharedLimits(settings.cache, ",".join(core.names))
            core.key_limits.processes = worker.count if worker else 1
            core.share_limits(
                shared,
                SharedSlots(shared, worker.folder.name, whole.max_concurrent, whole.max_queue) if worker else None,
            )

        def settled() -> None:
            print_banner(core, address)
            if worker is not None:
                worker.settled()

        if worker is not None:
            core.worker_metrics = WorkerMetrics(worker.folder, worker.number, core.metrics.registry)
            core.readiness.replaces = not worker.first
            # Where there are others: alone it answers probes from the first moment on.
            server.settle_first = worker.count > 1 and not speaks
        if speaks:
            server.when_settled = settled

            def absent(error: QvlError) -> None:
                print(f"qvl-serve: waiting for an engine: {error}", file=sys.stderr, flush=True)
                if worker is not None and worker.count == 1:
                    # Nobody else waits for it, and it has a successor from here on.
                    worker.settled()

            core.readiness.on_absence = absent
            if settings.host not in LOOPBACK and not core.keys.required:
                print("qvl-serve: WARNING: anybody who can reach this address can use it", file=sys.stderr)
            print(f"loading {core.names[0]}; {address}/ready tells when it is done", file=sys.stderr, flush=True)
        run_server(server, listener)
    finally:
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
    options = settings.backend_options()
    if endpoints is not None:
        options.setdefault("base_url", endpoints())
    elif settings.base_url:
        options.setdefault("base_url", list(settings.base_url))
    if settings.replicas is None:
        if settings.devices is not None or settings.ray_address is not None:
            raise ConfigError("--devices and --ray-address need --replicas", hint="--replicas 8 --devices npu")
        return settings.model, options
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
