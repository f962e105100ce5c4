"""Settings of the service: flag, else environment (WEIGHBRIDGE_...), else file, else default; `--help` shows them."""

from __future__ import annotations

import argparse
import os
import tomllib
from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationError, field_validator
from pydantic_core import ErrorDetails
from pydantic_settings import (
    BaseSettings,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    TomlConfigSettingsSource,
)

from weighting_contract.errors import InvalidArgument


class Settings(BaseSettings):
    """Weighbridge's weighting service: hosts data weighting models over gRPC and REST."""

    model_config = SettingsConfigDict(
        env_prefix="WEIGHBRIDGE_",
        cli_prog_name="python -m weighting_service",
        cli_kebab_case=True,
        cli_implicit_flags=True,
        extra="forbid",
    )

    config: Path | None = Field(None, description="TOML file with any of these settings, underscores in their names")
    host: str = Field("127.0.0.1", description="address to listen on; 0.0.0.0 for all")
    grpc_port: int = Field(50051, ge=0, le=65535, description="port for gRPC; 0 takes a free one")
    rest_port: int = Field(8080, ge=0, le=65535, description="port for REST, health and metrics; 0 takes a free one")
    state: Path = Field(
        Path("weighbridge-state"), description="directory of the update log, the snapshots and uploaded references"
    )
    log: str = Field(
        "", description="redis://HOST:PORT/DB (rediss://: TLS) for a log that several services share; else in --state"
    )
    snapshots: str = Field(
        "", description="file:///DIR or s3://BUCKET/PREFIX for snapshots and uploaded references; else in --state"
    )
    durability: Literal["strict", "relaxed"] = Field(
        "strict", description="strict refuses a Redis that may lose acknowledged updates; relaxed warns"
    )
    models: Path | None = Field(
        None, description="directory of encoder models, tokenizers and references that specs and jobs may name"
    )
    device: str = Field("auto", description="auto, cpu, cuda or cuda:N; auto takes CUDA where there is one")
    threads: int = Field(0, ge=0, description="CPU threads for torch; 0: torch's own choice")
    snapshot_every: int = Field(200, ge=1, description="updates between two snapshots of a weighter")
    snapshots_kept: int = Field(3, ge=1, description="snapshots kept of each weighter")
    updates_kept: int = Field(
        10_000, ge=0, description="updates kept in the log behind the oldest kept snapshot, to look at and to replay"
    )
    sync_s: float = Field(0.1, gt=0, le=60, description="seconds between two looks at what other services wrote")
    max_message_mb: int = Field(64, ge=1, le=1024, description="largest request, MiB")
    max_batch_samples: int = Field(8192, ge=1, description="most samples a batch")
    max_batch_tokens: int = Field(4_194_304, ge=1, description="most padded tokens a batch")
    max_queued_calls: int = Field(256, ge=1, description="Score calls waiting for the device before refusing more")
    samples_per_pass: int = Field(8192, ge=1, description="most samples that one forward pass takes from several calls")
    tokens_per_pass: int = Field(65_536, ge=1, description="most tokens that one forward pass takes likewise")
    cached_samples: int = Field(
        262_144, ge=0, description="samples whose raw statistics each loaded reference keeps in memory; 0: none"
    )
    max_pending_updates: int = Field(1000, ge=1, description="updates logged but not yet applied before refusing more")
    max_queue_wait_s: float = Field(30.0, gt=0, description="longest that a Score call waits for the device")
    max_calls_per_job: int = Field(64, ge=1, description="calls of one job that may be under way")
    max_weighters_per_tenant: int = Field(100, ge=1, description="weighters of one tenant")
    max_references_per_tenant: int = Field(1000, ge=1, description="uploaded references of one tenant")
    max_jobs_per_tenant: int = Field(1000, ge=1, description="open jobs of one tenant")
    max_weighter_parameters: int = Field(1_000_000_000, ge=1, description="parameters of one weighter")
    max_log_mb: int = Field(16_384, ge=1, description="size of the update log beyond which updates are refused, MiB")
    min_free_disk_mb: int = Field(256, ge=0, description="free space below which updates are refused, MiB")
    job_idle_s: float = Field(900.0, gt=0, description="seconds without a call after which a job is closed")
    tokens: Path | None = Field(
        None,
        description="TOML file of hashed tokens (python -m weighting_service token); without it and without "
        "WEIGHBRIDGE_TOKENS_TOML: no authentication",
    )
    insecure: bool = Field(False, description="listen beyond this machine without tokens")
    tls_cert: Path | None = Field(None, description="PEM file of the certificate chain, for TLS on both ports")
    tls_key: Path | None = Field(None, description="PEM file of its private key")
    tls_client_ca: Path | None = Field(None, description="PEM file of the CA that clients must be of (mTLS)")
    drain_s: float = Field(10.0, ge=0, le=600, description="seconds that calls under way get at SIGTERM")
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="what to log")
    log_format: Literal["text", "json"] = Field("text", description="text for people, json: one object a line")

    @field_validator("device")
    @classmethod
    def _known_device(cls, value: str) -> str:
        if value not in ("auto", "cpu", "cuda") and not (value.startswith("cuda:") and value[5:].isdigit()):
            raise ValueError(f"{value!r} is not a device; expected auto, cpu, cuda or cuda:N")
        return value


def load_settings(arguments: list[str]) -> Settings:
    """Settings from command-line arguments, environment and file, in this order of precedence.

    Raises:
        InvalidArgument: naming the setting, what was given and what is expected.
        SystemExit: from `--help` (0) and unknown flags (2), with the words already printed.
    """
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    early.add_argument("--config", type=Path, default=os.environ.get("WEIGHBRIDGE_CONFIG"))
    file = early.parse_known_args(arguments)[0].config

    class WithFile(Settings):
        __doc__ = Settings.__doc__
        model_config = SettingsConfigDict(toml_file=file)

        @classmethod
        def settings_customise_sources(
            cls,
            settings_cls: type[BaseSettings],
            init_settings: PydanticBaseSettingsSource,
            env_settings: PydanticBaseSettingsSource,
            dotenv_settings: PydanticBaseSettingsSource,
            file_secret_settings: PydanticBaseSettingsSource,
        ) -> tuple[PydanticBaseSettingsSource, ...]:
            return init_settings, env_settings, TomlConfigSettingsSource(settings_cls)

    if file is not None and not Path(file).is_file():
        raise InvalidArgument(f"config is {str(file)!r}, expected a TOML file")
    try:
        return WithFile(_cli_parse_args=arguments)  # type: ignore[call-arg]
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as exc:
        raise InvalidArgument(f"config {file} is not TOML: {exc}") from exc
    except OSError as exc:
        raise InvalidArgument(f"config {file} can't be read: {exc.strerror}") from exc
    except ValidationError as exc:
        raise InvalidArgument("; ".join(_sentence(error) for error in exc.errors())) from exc


def _sentence(error: ErrorDetails) -> str:
    flag = "--" + ".".join(map(str, error["loc"])).replace("_", "-")
    return f"{flag}: {error['msg'].removeprefix('Value error, ')} (given: {error['input']!r})"
