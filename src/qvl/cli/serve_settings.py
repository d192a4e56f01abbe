"""The settings of `qvl serve`, each declared once with its option, environment variable and help."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Annotated, ClassVar, Final

import typer

from qvl.cli.parse_args import backend_options, refuse_lora
from qvl.errors import ConfigError
from qvl.media.policy import DEFAULT_POLICY, MediaPolicy
from qvl.server.settings import ServerSettings
from qvl.types import JsonObject

MB: Final = 1024 * 1024
_SERVER: Final = ServerSettings()
# Options of the local engine alone, and of backends whose model runs in this process.
ENGINE_OPTIONS: Final = ("quantize", "decode_kernel", "goal", "max_step_ms")
PROCESS_OPTIONS: Final = ("device", "dtype", "max_model_len", "max_num_seqs")
# Where else the weights' form is chosen.
WEIGHTS_ELSEWHERE: Final = {
    "openai": "set it at the server behind the endpoint",
    "vllm": "vLLM's own is --option quantization=NAME",
    "openvino": "choose it when the model is converted: --weight-format int8",
}
_model = partial(typer.Option, rich_help_panel="Model")
_address = partial(typer.Option, rich_help_panel="Address")
_cache = partial(typer.Option, rich_help_panel="Cache")
_batches = partial(typer.Option, rich_help_panel="Batches")
_security = partial(typer.Option, rich_help_panel="Security")
_load = partial(typer.Option, rich_help_panel="Load")
_pictures = partial(typer.Option, rich_help_panel="Pictures")
_logs = partial(typer.Option, rich_help_panel="Logs")
_replicas = partial(typer.Option, rich_help_panel="Replicas on many devices (Ray Serve)")


@dataclass(frozen=True, slots=True)
class ServeSettings:
    """The options of `qvl serve`; fields that are also in ServerSettings have the same defaults."""

    ENV_PREFIX: ClassVar[str] = "QVL_"

    model: Annotated[
        str | None,
        typer.Argument(
            envvar=["MODEL_PATH"],
            help="A path, hub id, openai:NAME, vllm:NAME, openvino:NAME; left out: the bundled model.",
        ),
    ] = None
    served_model_name: Annotated[
        list[str] | None, _model(help="A name to answer to; may be repeated. Without one, MODEL_ID is it.")
    ] = None
    any_model_name: Annotated[bool, _model(help="Answer to every other name.")] = _SERVER.any_model_name
    device: Annotated[str | None, _model(envvar=["DEVICE"], help="auto, npu, cuda, mps or cpu.")] = None
    dtype: Annotated[str | None, _model(help="bfloat16, float16, float32.")] = None
    max_model_len: Annotated[int | None, _model(help="Tokens of context.")] = None
    max_num_seqs: Annotated[int | None, _model(help="Sequences in a batch.")] = None
    quantize: Annotated[str | None, _model(help="int8: a local model's weights in 8 bits, on a CPU.")] = None
    decode_kernel: Annotated[
        str | None, _model(help="plain, onednn or fbgemm on a CPU; left out: the fastest, as measured.")
    ] = None
    goal: Annotated[str | None, _model(help="throughput, or latency: even streams while others start.")] = None
    max_step_ms: Annotated[float | None, _model(help="Longest step of the local engine: tokens wait no longer.")] = None
    lora: Annotated[
        list[str] | None,
        _model(metavar="NAME=PATH", help="A LoRA adapter that answers to NAME beside the model; may be repeated."),
    ] = None
    base_url: Annotated[list[str] | None, _model(help="Endpoint of openai:NAME; may be repeated.")] = None
    base_url_file: Annotated[
        str | None, _model(help="Endpoints, one a line: URL weight=2 limit=16. SIGHUP reads it again.")
    ] = None
    upstream_key: Annotated[str | None, _model(envvar=["OPENAI_API_KEY"], help="Key of the endpoint.")] = None
    calibration: Annotated[str | None, _model(help="What qvl calibrate wrote for this model.")] = None
    abstain: Annotated[
        list[str] | None,
        _model(metavar="[FIELD=]0.9", help="Tell nothing that is less sure, of all or a field; may be repeated."),
    ] = None
    option: Annotated[
        list[str] | None, _model(envvar=[], help="NAME=VALUE for the backend, VALUE in JSON or plain; may be repeated.")
    ] = None
    canary: Annotated[bool, _model(help="Ask about a tiny picture before ready.")] = _SERVER.canary
    exit_on_engine_death: Annotated[bool, _model(help="End with an error when the engine dies.")] = False
    replicas: Annotated[int | None, _replicas(min=1, help="Engine processes, each on a device of its own.")] = None
    devices: Annotated[str | None, _replicas(help="Of what: auto, npu, cuda or cpu.")] = None
    ray_address: Annotated[
        str | None,
        _replicas(help="Cluster to use: auto (this host's) or HOST:PORT; left out: one for this host alone."),
    ] = None
    batch_dir: Annotated[
        str | None, _batches(help="Folder of /v1/files and /v1/batches; left out: qvl's own; off: none.")
    ] = None
    batch_disk_mb: Annotated[int, _batches(min=1, help="For all files in it; a key may use half.")] = (
        _SERVER.batch_disk_bytes // MB
    )
    max_batch_file_mb: Annotated[int, _batches(min=1, help="Largest upload.")] = _SERVER.max_batch_file_bytes // MB
    batch_concurrency: Annotated[int, _batches(min=1, help="Lines at a time; one while others wait.")] = (
        _SERVER.batch_concurrency
    )
    host: Annotated[str, _address(envvar=["SERVER_HOST"], help="Address to listen on.")] = "127.0.0.1"
    port: Annotated[int, _address(envvar=["SERVER_PORT"], min=0, max=65535, help="0 takes any.")] = 8000
    root_path: Annotated[str, _address(help="Path prefix of a proxy in front.")] = ""
    tls_cert: Annotated[str | None, _address(help="Certificate file (PEM).")] = None
    tls_key: Annotated[str | None, _address(help="Its private key (PEM).")] = None
    cache: Annotated[str | None, _cache(help="sqlite:///file.db, redis://..., memory:, off.")] = None
    cache_mode: Annotated[str | None, _cache(help="auto (what must be the same again), always, off.")] = None
    cache_ttl: Annotated[float | None, _cache(help="Seconds to keep answers.")] = None
    namespace: Annotated[str | None, _cache(help="Keeps answers apart.")] = None
    response_ttl: Annotated[float, _cache(help="Seconds to keep what previous_response_id names.")] = (
        _SERVER.response_ttl
    )
    api_key: Annotated[list[str] | None, _security(help="A key that clients send; may be repeated.")] = None
    api_key_file: Annotated[str | None, _security(help="Keys, one a line; SIGHUP reads it again.")] = None
    allow_unauthenticated: Annotated[bool, _security(help="Serve other machines without a key.")] = False
    cors_origin: Annotated[list[str] | None, _security(help="Origin whose pages may call; may be repeated.")] = None
    workers: Annotated[int, _load(min=1, help="Server processes at the port, in front of openai:NAME.")] = 1
    max_concurrent: Annotated[int, _load(help="Requests at the backend.")] = _SERVER.max_concurrent
    max_queue: Annotated[int, _load(help="Requests that may wait; the rest get 429.")] = _SERVER.max_queue
    max_queue_picture_tokens: Annotated[int, _load(help="Picture tokens that may wait.")] = (
        _SERVER.max_queue_picture_tokens
    )
    requests_per_minute: Annotated[int | None, _load(help="For each key.")] = _SERVER.requests_per_minute
    concurrent_per_key: Annotated[int | None, _load(help="For each key.")] = _SERVER.concurrent_per_key
    request_timeout: Annotated[float, _load(help="Seconds for one request.")] = _SERVER.request_timeout
    drain_timeout: Annotated[float, _load(help="Seconds to finish after SIGTERM.")] = _SERVER.drain_timeout
    stall_timeout: Annotated[float, _load(help="Seconds without a token: not ready.")] = _SERVER.stall_timeout
    body_timeout: Annotated[float, _load(help="Seconds for a body to arrive.")] = _SERVER.body_timeout
    header_timeout: Annotated[float, _load(help="Seconds for headers to arrive.")] = 10.0
    max_body_mb: Annotated[float, _load(help="Largest body; larger ones get 413.")] = _SERVER.max_body_bytes / MB
    max_pixels: Annotated[int | None, _pictures(envvar=["MAX_IMAGE_PIXELS"], help="Budget of a picture.")] = None
    min_pixels: Annotated[int | None, _pictures(help="Smaller ones are enlarged.")] = None
    max_decode_mb: Annotated[int, _pictures(min=1, help="To decode one picture.")] = (
        _SERVER.media.max_decode_bytes // MB
    )
    max_decoded_mb: Annotated[int, _pictures(min=1, help="Pixels of a request.")] = _SERVER.max_decoded_bytes // MB
    allowed_media_domains: Annotated[
        list[str] | None, _pictures(help="The only hosts to fetch from; .example.org means all below; may be repeated.")
    ] = None
    allowed_private: Annotated[
        list[str] | None, _pictures(help="Hosts or networks to fetch from though they are not public; may be repeated.")
    ] = None
    limit_mm_per_prompt: Annotated[
        str | None, _pictures(help='Of a request, as vLLM writes it: {"image": 4, "video": 1} or image=4,video=1.')
    ] = None
    limit_images: Annotated[
        int | None, _pictures("--limit-mm-per-prompt.image", envvar=[], min=0, help="The same: 4.")
    ] = None
    limit_videos: Annotated[
        int | None, _pictures("--limit-mm-per-prompt.video", envvar=[], min=0, help="The same: 1.")
    ] = None
    media_timeout: Annotated[float, _pictures(help="Seconds to fetch a picture.")] = _SERVER.media.timeout
    log_level: Annotated[str, _logs(help="debug, info, warning, error.")] = "info"
    log_format: Annotated[str, _logs(help="json or text.")] = "json"
    otlp_traces_endpoint: Annotated[
        str | None, _logs(help="Where to send traces by OTLP over HTTP; OTEL_EXPORTER_OTLP_ENDPOINT does as well.")
    ] = None

    @property
    def api_keys(self) -> tuple[str, ...]:
        return tuple(key for key in self.api_key or () if key)

    def media_policy(self) -> MediaPolicy:
        """Return the media policy for pictures in requests."""
        return MediaPolicy(
            allow_files=False,
            timeout=self.media_timeout,
            max_decode_bytes=self.max_decode_mb * MB,
            allowed_domains=_listed(self.allowed_media_domains),
            allowed_private=_listed(self.allowed_private),
            max_videos=self.limits().get("video", DEFAULT_POLICY.max_videos),
        ).with_sizes(self.max_pixels, self.min_pixels)

    def server_settings(self, ctx: typer.Context) -> ServerSettings:
        """Return the settings of the application."""
        shared: JsonObject = {
            field.name: getattr(self, field.name) for field in fields(ServerSettings) if hasattr(self, field.name)
        }
        shared["batch_dir"] = self._batch_folder()
        return ServerSettings(
            **shared,
            served_model_names=self._served_model_names(ctx),
            max_body_bytes=int(self.max_body_mb * MB),
            max_decoded_bytes=self.max_decoded_mb * MB,
            batch_disk_bytes=self.batch_disk_mb * MB,
            max_batch_file_bytes=self.max_batch_file_mb * MB,
            cors_origins=_listed(self.cors_origin),
            media=self.media_policy(),
            max_images=self.limits().get("image"),
        )

    def limits(self) -> dict[str, int]:
        """Return the most pictures and videos of a request, from either form of the option.

        Raises:
            ConfigError: a malformed value, both forms, or another medium.
        """
        apart = {"image": self.limit_images, "video": self.limit_videos}
        named = {name: count for name, count in apart.items() if count is not None}
        if self.limit_mm_per_prompt is None:
            return named
        if named:
            raise ConfigError("--limit-mm-per-prompt is given in two forms", hint='write one: {"image": 4}')
        return read_mm_limits(self.limit_mm_per_prompt)

    def _batch_folder(self) -> Path | None:
        """Return the folder of files and batches; None for "off"."""
        from qvl.config import data_folder, in_home

        if self.batch_dir == "off":
            return None
        if not self.batch_dir:
            return data_folder() / "batches"
        folder = in_home(self.batch_dir).absolute()
        if not folder.parent.is_dir() or (folder.exists() and not folder.is_dir()):
            hint = "make its parent first" if not folder.exists() else "it is a file: name a folder"
            raise ConfigError(f"--batch-dir {self.batch_dir} cannot be used", hint=hint, param="batch_dir")
        return folder

    def _served_model_names(self, ctx: typer.Context) -> tuple[str, ...]:
        """Return the served model names; the legacy variable MODEL_ID is one name, even with commas."""
        model_id = os.environ.get("MODEL_ID", "").strip()
        explicit = source_of_value(ctx, "served_model_name") in ("COMMANDLINE", "ENVIRONMENT")
        return (model_id,) if model_id and not explicit else _listed(self.served_model_name)

    def backend_options(self) -> JsonObject:
        """Return the backend's options without its endpoints.

        Raises:
            ConfigError: an `--option` without a name, or with that of a pipeline argument.
        """
        options = {name: getattr(self, name) for name in (*PROCESS_OPTIONS, *ENGINE_OPTIONS)}
        self._refuse_engine_options(options)
        if self.model and self.model.startswith("openai:"):
            options["api_key"] = self.upstream_key
        named = backend_options(self.option or ())
        if self.lora:
            if "adapter" in named:
                hint = "name them all by --lora, or one for every request by --option adapter=PATH"
                raise ConfigError("--lora and --option adapter exclude each other", hint=hint, param="lora")
            named["adapter"] = read_adapters(self.lora)
        return {name: value for name, value in options.items() if value is not None} | named

    def _refuse_engine_options(self, options: JsonObject) -> None:
        """Raise ConfigError for an option of an engine that the named model does not run on."""
        backend, colon, _ = (self.model or "").partition(":")
        if not colon or backend not in ("openai", "replay", "vllm", "openvino"):
            return
        if self.lora:
            refuse_lora(self.model)
        inside = backend in ("vllm", "openvino")
        for name in ENGINE_OPTIONS if inside else (*PROCESS_OPTIONS, *ENGINE_OPTIONS):
            if options[name] is not None:
                kind = "a local model" if name in ENGINE_OPTIONS else "a model that runs here"
                elsewhere = WEIGHTS_ELSEWHERE.get(backend) if name == "quantize" else None
                raise ConfigError(
                    f"--{name.replace('_', '-')} is for {kind}, which {self.model} is not",
                    hint=f"leave it out{', or ' + elsewhere if elsewhere else ''}",
                    param=name,
                )


def read_adapters(texts: Sequence[str]) -> dict[str, str]:
    """Return the paths of `NAME=PATH` by name.

    Raises:
        ConfigError: a text without a name or a path, or one name twice.
    """
    found: dict[str, str] = {}
    for text in texts:
        name, equals, path = text.partition("=")
        if not (name.strip() and equals and path.strip()):
            raise ConfigError(f"--lora {text!r} cannot be read", hint="--lora NAME=PATH", param="lora")
        if name.strip() in found:
            raise ConfigError(f"--lora names {name.strip()!r} twice", hint="give each a name of its own", param="lora")
        found[name.strip()] = path.strip()
    return found


def read_mm_limits(text: str) -> dict[str, int]:
    """Return the numbers of images and videos in a `--limit-mm-per-prompt`: JSON, or `image=4,video=0`.

    Raises:
        ConfigError: the value is malformed, or allows a medium that is not supported.
    """
    param, hint = "limit_mm_per_prompt", 'write {"image": 4} or image=4'
    limits: object
    try:
        limits = json.loads(text) if text.lstrip().startswith("{") else _pairs(text)
    except ValueError as exc:
        raise ConfigError(f"invalid --limit-mm-per-prompt {text!r}", hint=hint, param=param) from exc
    assert isinstance(limits, dict)
    for name, limit in limits.items():
        # vLLM's longer form also has the sizes that memory is reserved for; here pictures are bounded by --max-pixels.
        count = limit.get("count") if isinstance(limit, dict) and limit.keys() <= {"count"} else limit
        if type(count) is not int or count < 0:
            raise ConfigError(f"--limit-mm-per-prompt: invalid limit {limit!r} of {name}", hint=hint, param=param)
        if name not in ("image", "video") and count:
            hint = "image and video are"
            raise ConfigError(f"--limit-mm-per-prompt: {name!r} is not supported", hint=hint, param=param)
        limits[name] = count
    return limits


def _pairs(text: str) -> dict[str, int]:
    pairs = (pair.partition("=") for pair in text.split(","))
    return {name.strip(): int(value) for name, _, value in pairs}


def source_of_value(ctx: typer.Context, name: str) -> str:
    """Return click's name for the source of an option's value: COMMANDLINE, ENVIRONMENT, DEFAULT_MAP (config file)…"""
    return getattr(ctx.get_parameter_source(name), "name", "")


def _listed(values: Sequence[str] | None) -> tuple[str, ...]:
    """Return all values; those with commas are split."""
    return tuple(part.strip() for part in ",".join(values or ()).split(",") if part.strip())
