"""`qvl-serve` and `qvl serve`: an OpenAI-compatible server over any backend."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import contextmanager
from typing import Annotated, Any, Final

import typer

MODEL: Final = "Model"
ADDRESS: Final = "Address"
CACHE: Final = "Cache"
SECURITY: Final = "Security"
LOAD: Final = "Load"
PICTURES: Final = "Pictures"
LOGS: Final = "Logs"
REPLICAS: Final = "Replicas on many devices (Ray Serve)"


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""
    app.command("serve", context_settings={"default_map": _from_config_file()})(serve)


def main(args: Sequence[str] | None = None) -> None:
    """Runs `qvl-serve`."""
    from qvl.cli import SingleCommand, one_line_errors
    from qvl.cli.terminal import open_streams

    open_streams()
    app = typer.Typer(add_completion=False, rich_markup_mode="rich", pretty_exceptions_enable=False)
    with one_line_errors_at_top(one_line_errors):
        settings = {"help_option_names": ["-h", "--help"], "default_map": _from_config_file()}
        app.command(cls=SingleCommand, context_settings=settings)(serve)
        app(args=args, prog_name="qvl-serve", standalone_mode=True)


def one_line_errors_at_top(guard: Any) -> Any:
    """`one_line_errors` outside of any group: typer's Exit becomes the process's own."""

    @contextmanager
    def guarded() -> Any:
        try:
            with guard():
                yield
        except typer.Exit as exc:
            sys.exit(exc.exit_code)

    return guarded()


def _from_config_file() -> dict[str, Any]:
    """The `[serve]` table of qvl's config file, by option name; a ConfigError where it names none."""
    from inspect import signature

    from qvl import config

    table = {name.replace("-", "_"): value for name, value in config.load().serve.items()}
    known = signature(serve).parameters.keys() - {"ctx"}
    for name in table.keys() - known:
        raise config.unknown_setting(name, known, "serve")
    return table


def serve(
    ctx: typer.Context,
    model: Annotated[
        str | None,
        typer.Argument(
            envvar=["QVL_MODEL", "MODEL_PATH"],
            help="A path, hub id, openai:NAME or vllm:NAME; left out: the bundled tiny model.",
        ),
    ] = None,
    served_model_name: Annotated[
        list[str] | None,
        typer.Option(
            envvar="QVL_SERVED_MODEL_NAME",
            help="A name to answer to; may be repeated. Without one, MODEL_ID is it.",
            rich_help_panel=MODEL,
        ),
    ] = None,
    any_model_name: Annotated[
        bool, typer.Option(envvar="QVL_ANY_MODEL_NAME", help="Answer to every other name.", rich_help_panel=MODEL)
    ] = False,
    device: Annotated[
        str | None,
        typer.Option(envvar=["QVL_DEVICE", "DEVICE"], help="auto, npu, cuda, mps or cpu.", rich_help_panel=MODEL),
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(envvar="QVL_DTYPE", help="bfloat16, float16, float32.", rich_help_panel=MODEL)
    ] = None,
    max_model_len: Annotated[
        int | None, typer.Option(envvar="QVL_MAX_MODEL_LEN", help="Tokens of context.", rich_help_panel=MODEL)
    ] = None,
    max_num_seqs: Annotated[
        int | None, typer.Option(envvar="QVL_MAX_NUM_SEQS", help="Sequences in a batch.", rich_help_panel=MODEL)
    ] = None,
    base_url: Annotated[
        list[str] | None,
        typer.Option(envvar="QVL_BASE_URL", help="Endpoint of openai:NAME; may be repeated.", rich_help_panel=MODEL),
    ] = None,
    base_url_file: Annotated[
        str | None,
        typer.Option(
            envvar="QVL_BASE_URL_FILE",
            help="Endpoints, one a line: URL weight=2 limit=16. SIGHUP reads it again.",
            rich_help_panel=MODEL,
        ),
    ] = None,
    upstream_key: Annotated[
        str | None,
        typer.Option(envvar=["QVL_UPSTREAM_KEY", "OPENAI_API_KEY"], help="Key of the endpoint.", rich_help_panel=MODEL),
    ] = None,
    option: Annotated[
        list[str] | None,
        typer.Option(
            help="NAME=VALUE for the backend, VALUE in JSON or plain; may be repeated.", rich_help_panel=MODEL
        ),
    ] = None,
    canary: Annotated[
        bool, typer.Option(envvar="QVL_CANARY", help="Ask about a tiny picture before ready.", rich_help_panel=MODEL)
    ] = True,
    exit_on_engine_death: Annotated[
        bool,
        typer.Option(
            envvar="QVL_EXIT_ON_ENGINE_DEATH", help="End with an error when the engine dies.", rich_help_panel=MODEL
        ),
    ] = False,
    replicas: Annotated[
        int | None,
        typer.Option(
            envvar="QVL_REPLICAS",
            min=1,
            help="Engine processes, each on a device of its own.",
            rich_help_panel=REPLICAS,
        ),
    ] = None,
    devices: Annotated[
        str | None,
        typer.Option(envvar="QVL_DEVICES", help="Of what: auto, npu, cuda or cpu.", rich_help_panel=REPLICAS),
    ] = None,
    ray_address: Annotated[
        str | None,
        typer.Option(
            envvar="QVL_RAY_ADDRESS",
            help="Cluster to use: auto (this host's) or HOST:PORT; left out: one for this host alone.",
            rich_help_panel=REPLICAS,
        ),
    ] = None,
    host: Annotated[
        str, typer.Option(envvar=["QVL_HOST", "SERVER_HOST"], help="Address to listen on.", rich_help_panel=ADDRESS)
    ] = "127.0.0.1",
    port: Annotated[
        int,
        typer.Option(
            envvar=["QVL_PORT", "SERVER_PORT"], min=0, max=65535, help="0 takes any.", rich_help_panel=ADDRESS
        ),
    ] = 8000,
    root_path: Annotated[
        str, typer.Option(envvar="QVL_ROOT_PATH", help="Path prefix of a proxy in front.", rich_help_panel=ADDRESS)
    ] = "",
    tls_cert: Annotated[
        str | None, typer.Option(envvar="QVL_TLS_CERT", help="Certificate file (PEM).", rich_help_panel=ADDRESS)
    ] = None,
    tls_key: Annotated[
        str | None, typer.Option(envvar="QVL_TLS_KEY", help="Its private key (PEM).", rich_help_panel=ADDRESS)
    ] = None,
    cache: Annotated[
        str | None,
        typer.Option(envvar="QVL_CACHE", help="sqlite:///file.db, redis://..., memory:, off.", rich_help_panel=CACHE),
    ] = None,
    cache_mode: Annotated[
        str | None,
        typer.Option(
            envvar="QVL_CACHE_MODE", help="auto (what must be the same again), always, off.", rich_help_panel=CACHE
        ),
    ] = None,
    cache_ttl: Annotated[
        float | None, typer.Option(envvar="QVL_CACHE_TTL", help="Seconds to keep answers.", rich_help_panel=CACHE)
    ] = None,
    namespace: Annotated[
        str | None, typer.Option(envvar="QVL_NAMESPACE", help="Keeps answers apart.", rich_help_panel=CACHE)
    ] = None,
    api_key: Annotated[
        list[str] | None,
        typer.Option(envvar="QVL_API_KEY", help="A key that clients send; may be repeated.", rich_help_panel=SECURITY),
    ] = None,
    api_key_file: Annotated[
        str | None,
        typer.Option(
            envvar="QVL_API_KEY_FILE", help="Keys, one a line; SIGHUP reads it again.", rich_help_panel=SECURITY
        ),
    ] = None,
    allow_unauthenticated: Annotated[
        bool,
        typer.Option(
            envvar="QVL_ALLOW_UNAUTHENTICATED", help="Serve other machines without a key.", rich_help_panel=SECURITY
        ),
    ] = False,
    cors_origin: Annotated[
        list[str] | None,
        typer.Option(
            envvar="QVL_CORS_ORIGIN", help="Origin whose pages may call; may be repeated.", rich_help_panel=SECURITY
        ),
    ] = None,
    max_concurrent: Annotated[
        int, typer.Option(envvar="QVL_MAX_CONCURRENT", help="Requests at the backend.", rich_help_panel=LOAD)
    ] = 256,
    max_queue: Annotated[
        int,
        typer.Option(envvar="QVL_MAX_QUEUE", help="Requests that may wait; the rest get 429.", rich_help_panel=LOAD),
    ] = 256,
    max_queue_picture_tokens: Annotated[
        int,
        typer.Option(envvar="QVL_MAX_QUEUE_PICTURE_TOKENS", help="Picture tokens that may wait.", rich_help_panel=LOAD),
    ] = 1_000_000,
    requests_per_minute: Annotated[
        int | None, typer.Option(envvar="QVL_REQUESTS_PER_MINUTE", help="For each key.", rich_help_panel=LOAD)
    ] = None,
    concurrent_per_key: Annotated[
        int | None, typer.Option(envvar="QVL_CONCURRENT_PER_KEY", help="For each key.", rich_help_panel=LOAD)
    ] = None,
    request_timeout: Annotated[
        float, typer.Option(envvar="QVL_REQUEST_TIMEOUT", help="Seconds for one request.", rich_help_panel=LOAD)
    ] = 600.0,
    drain_timeout: Annotated[
        float, typer.Option(envvar="QVL_DRAIN_TIMEOUT", help="Seconds to finish after SIGTERM.", rich_help_panel=LOAD)
    ] = 30.0,
    stall_timeout: Annotated[
        float,
        typer.Option(envvar="QVL_STALL_TIMEOUT", help="Seconds without a token: not ready.", rich_help_panel=LOAD),
    ] = 120.0,
    body_timeout: Annotated[
        float, typer.Option(envvar="QVL_BODY_TIMEOUT", help="Seconds for a body to arrive.", rich_help_panel=LOAD)
    ] = 30.0,
    header_timeout: Annotated[
        float, typer.Option(envvar="QVL_HEADER_TIMEOUT", help="Seconds for headers to arrive.", rich_help_panel=LOAD)
    ] = 10.0,
    max_body_mb: Annotated[
        float, typer.Option(envvar="QVL_MAX_BODY_MB", help="Largest body; larger ones get 413.", rich_help_panel=LOAD)
    ] = 64.0,
    max_pixels: Annotated[
        int | None,
        typer.Option(
            envvar=["QVL_MAX_PIXELS", "MAX_IMAGE_PIXELS"], help="Budget of a picture.", rich_help_panel=PICTURES
        ),
    ] = None,
    min_pixels: Annotated[
        int | None, typer.Option(envvar="QVL_MIN_PIXELS", help="Smaller ones are enlarged.", rich_help_panel=PICTURES)
    ] = None,
    max_decode_mb: Annotated[
        int, typer.Option(envvar="QVL_MAX_DECODE_MB", min=1, help="To decode one picture.", rich_help_panel=PICTURES)
    ] = 256,
    max_decoded_mb: Annotated[
        int, typer.Option(envvar="QVL_MAX_DECODED_MB", min=1, help="Pixels of a request.", rich_help_panel=PICTURES)
    ] = 192,
    allowed_media_domains: Annotated[
        list[str] | None,
        typer.Option(
            envvar="QVL_ALLOWED_MEDIA_DOMAINS",
            help="The only hosts to fetch from; .example.org means all below; may be repeated.",
            rich_help_panel=PICTURES,
        ),
    ] = None,
    allowed_private: Annotated[
        list[str] | None,
        typer.Option(
            envvar="QVL_ALLOWED_PRIVATE",
            help="Hosts or networks to fetch from though they are not public; may be repeated.",
            rich_help_panel=PICTURES,
        ),
    ] = None,
    media_timeout: Annotated[
        float, typer.Option(envvar="QVL_MEDIA_TIMEOUT", help="Seconds to fetch a picture.", rich_help_panel=PICTURES)
    ] = 20.0,
    log_level: Annotated[
        str, typer.Option(envvar="QVL_LOG_LEVEL", help="debug, info, warning, error.", rich_help_panel=LOGS)
    ] = "info",
    log_format: Annotated[
        str, typer.Option(envvar="QVL_LOG_FORMAT", help="json or text.", rich_help_panel=LOGS)
    ] = "json",
    otlp_traces_endpoint: Annotated[
        str | None,
        typer.Option(
            envvar="QVL_OTLP_TRACES_ENDPOINT",
            help="Where to send traces by OTLP over HTTP; OTEL_EXPORTER_OTLP_ENDPOINT does as well.",
            rich_help_panel=LOGS,
        ),
    ] = None,
) -> None:
    """Serve an OpenAI-compatible API over any backend, with a cache.

    Options come from arguments, then the environment, then the table [bold]serve[/bold] of the config file.
    """
    from qvl.errors import ConfigError, MissingDependencyError

    try:
        from qvl.server.app import create_app
        from qvl.server.auth import LOOPBACK, KeyRing, check_open
        from qvl.server.pool_admin import source_of
        from qvl.server.run_uvicorn import bind, make_server, run_server
        from qvl.server.tracing import exporting
    except ModuleNotFoundError as exc:
        from qvl.suggest import install_line

        raise MissingDependencyError(f"qvl-serve needs the package {exc.name!r}", hint=install_line("server")) from exc
    from qvl.cli.banner import print_banner, shown_host
    from qvl.cli.repeated_options import backend_options, listed, served_names
    from qvl.media.policy import MediaPolicy
    from qvl.pipeline.async_pipeline import TINY_NOTICE, AsyncPipeline
    from qvl.server.settings import ServerSettings

    keys = tuple(key for key in api_key or () if key)
    check_open(host, KeyRing(keys, api_key_file), allowed=allow_unauthenticated)
    configure_logs(log_level, log_format)
    gate = MediaPolicy(
        allow_files=False,
        timeout=media_timeout,
        max_decode_bytes=max_decode_mb * 1024 * 1024,
        allowed_domains=listed(allowed_media_domains),
        allowed_private=listed(allowed_private),
    ).with_sizes(max_pixels, min_pixels)
    settings = ServerSettings(
        served_model_names=served_names(ctx, served_model_name),
        any_model_name=any_model_name,
        api_keys=keys,
        api_key_file=api_key_file,
        max_body_bytes=int(max_body_mb * 1024 * 1024),
        body_timeout=body_timeout,
        max_concurrent=max_concurrent,
        max_queue=max_queue,
        max_queue_picture_tokens=max_queue_picture_tokens,
        max_decoded_bytes=max_decoded_mb * 1024 * 1024,
        requests_per_minute=requests_per_minute,
        concurrent_per_key=concurrent_per_key,
        request_timeout=request_timeout,
        drain_timeout=drain_timeout,
        stall_timeout=stall_timeout,
        canary=canary,
        cors_origins=listed(cors_origin),
        media=gate,
    )
    configured = getattr(ctx.get_parameter_source("base_url"), "name", "") == "DEFAULT_MAP"
    if base_url_file and base_url and not configured:
        raise ConfigError("--base-url and --base-url-file are one too many", hint="name all endpoints in the file")
    endpoints = source_of(base_url_file, configured=configured)
    given: dict[str, Any] = {
        "device": device,
        "dtype": dtype,
        "max_model_len": max_model_len,
        "max_num_seqs": max_num_seqs,
        "base_url": endpoints() if endpoints is not None else list(base_url) if base_url else None,
        "api_key": upstream_key if model and model.startswith("openai:") else None,
    }
    options = {name: value for name, value in given.items() if value is not None} | backend_options(option)
    if replicas is not None:
        if model is None:
            print(TINY_NOTICE, file=sys.stderr)
        devices = devices or options.pop("device", "auto")
        options |= {"replicas": replicas, "devices": devices, "ray_address": ray_address}
        options.setdefault("drain_timeout", drain_timeout)
        model = f"ray:{model or ''}"
    elif devices is not None or ray_address is not None:
        raise ConfigError("--devices and --ray-address are for replicas", hint="--replicas 8 --devices npu")
    traces = exporting(otlp_traces_endpoint)
    listener = bind(host, port)
    try:
        pipeline = AsyncPipeline(
            model,
            cache=cache,
            cache_mode=cache_mode,  # type: ignore[arg-type]
            cache_ttl=cache_ttl,
            namespace=namespace,
            media=gate,
            **options,
        )
        server = make_server(
            create_app(pipeline, settings, tracer_provider=traces),
            tls_cert=tls_cert,
            tls_key=tls_key,
            root_path=root_path,
            header_timeout=header_timeout,
        )
        server.core.endpoint_source = endpoints
        if exit_on_engine_death:
            server.exit_on_death()
        address = f"{'https' if tls_cert else 'http'}://{shown_host(host)}:{listener.getsockname()[1]}"
        server.when_settled = lambda: print_banner(server.core, address)
        if host not in LOOPBACK and not server.core.keys.required:
            print("qvl-serve: WARNING: everybody who can reach this address may use it", file=sys.stderr)
        print(f"loading {server.core.names[0]}; {address}/ready tells when it is done", file=sys.stderr, flush=True)
        run_server(server, listener)
    finally:
        listener.close()
        if traces is not None:
            traces.shutdown()


def configure_logs(level: str, form: str) -> None:
    """JSON lines (or text) on stderr; the pipeline's own line for each request is left to the server's."""
    import logging

    from qvl.errors import ConfigError
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
