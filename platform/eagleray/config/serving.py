"""The section `serve` of the one file: Ray Serve's words where the meaning is equal."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from eagleray.config.section import Section


class AutoscalingConfig(Section):
    """Ray Serve's autoscaling words."""

    min_replicas: NonNegativeInt = Field(1, description="Fewest replicas; 0 lets an idle model go away.")
    max_replicas: PositiveInt = Field(4, description="Most replicas.")
    initial_replicas: NonNegativeInt | None = Field(None, description="Replicas at the start.")
    target_queued_tokens: PositiveInt = Field(
        8192, description="Tokens, waiting and in work, per replica to aim at; about what one batch holds."
    )
    upscale_delay_s: NonNegativeFloat = Field(2.0, description="Seconds of overload before a replica is added.")
    downscale_delay_s: NonNegativeFloat = Field(60.0, description="Seconds of idleness before one is removed.")

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.min_replicas > self.max_replicas:
            raise ValueError(f"min_replicas {self.min_replicas} is above max_replicas {self.max_replicas}")
        return self


class ReplicaOptions(Section):
    """Ray resources of one replica."""

    num_cpus: NonNegativeFloat = Field(1.0, description="CPUs of one replica.")
    num_gpus: NonNegativeFloat = Field(0.0, description="GPUs of one replica.")


class RolloutConfig(Section):
    """When a new version is refused, or taken back."""

    max_score_drop: NonNegativeFloat | None = Field(
        0.05,
        description="How much worse a followed version's score may be than the current one's, as a share of it; "
        "null: scores are not compared.",
    )
    max_error_rate: Annotated[float, Field(ge=0, le=1)] = Field(
        0.05, description="Share of a canary's requests that may fail beyond those of the current version."
    )
    min_errors: PositiveInt = Field(5, description="Failures of a canary before it is judged.")
    load_beside: bool = Field(
        True,
        description="Load a new version beside the current one where memory allows; false: replica by replica.",
    )


class BulkConfig(Section):
    """Requests that are large: cut into chunks, which all replicas answer together."""

    min_items: PositiveInt = Field(256, description="A request with more items is a bulk request.")
    min_tokens: PositiveInt = Field(
        16_384, description="A request with more estimated tokens (4 bytes each) is a bulk request."
    )
    chunk_items: PositiveInt = Field(256, description="Most items of one chunk; slow models get smaller ones.")
    chunk_tokens: PositiveInt = Field(4096, description="Most estimated tokens of one chunk.")
    chunks_per_replica: PositiveInt = Field(3, description="Chunks that each running replica is given at once.")
    max_requests: PositiveInt = Field(8, description="Bulk requests at once; beyond it the answer is 429.")
    timeout_s: PositiveFloat = Field(900.0, description="Seconds after which a bulk request is given up.")


class ServeConfig(Section):
    """How the model is served."""

    ref: str | None = Field(None, description="What is served: @best, @latest, @production, @step-100, ...")
    num_replicas: PositiveInt | Literal["auto"] = Field(
        "auto", description="Replicas of the model; auto: autoscaling_config decides."
    )
    autoscaling_config: AutoscalingConfig = Field(
        default_factory=AutoscalingConfig, description="Bounds and pace of autoscaling (num_replicas: auto)."
    )
    ray_actor_options: ReplicaOptions = Field(
        default_factory=ReplicaOptions, description="Ray resources of one replica."
    )
    max_ongoing_requests: PositiveInt = Field(1000, description="Requests that one replica holds at once.")
    max_batch_size: PositiveInt = Field(64, description="Items in one batch of the model.")
    max_batch_tokens: PositiveInt = Field(8192, description="Tokens, padding included, in one batch of the model.")
    max_queued_tokens: PositiveInt = Field(
        65536, description="Tokens waiting in one replica; beyond it the answer is 429 with Retry-After."
    )
    max_items: PositiveInt = Field(10_000, description="Items in one request.")
    max_item_characters: PositiveInt = Field(20_000, description="Characters of one item.")
    max_body_bytes: PositiveInt = Field(16 * 1024 * 1024, description="Bytes of one request's body.")
    max_header_bytes: Annotated[int, Field(ge=1024, le=131_072)] = Field(
        16_384,
        description="Bytes of one request's line and headers; beyond it the answer is 431, or 414 for its URL.",
    )
    max_depth: Annotated[int, Field(ge=1, le=100)] = Field(
        32, description="Lists and objects inside one another in an input of a task of your own."
    )
    max_image_pixels: Annotated[int, Field(ge=1, le=50_000_000)] = Field(
        32 * 1024 * 1024, description="Pixels of one image, told from its header before it is decoded."
    )
    request_timeout_s: PositiveFloat = Field(
        60.0, description="Seconds after which a request is answered 408 or 503."
    )
    dtype: Literal["float32", "bfloat16", "float16", "int8"] = Field(
        "float32", description="Precision of inference; int8 is for CPUs, float16 for GPUs."
    )
    engine: Literal["auto", "torch", "ctranslate2"] = Field(
        "auto",
        description="What decodes: auto takes CTranslate2 where it is installed and knows the model.",
    )
    num_beams: Annotated[int, Field(ge=1, le=16)] = Field(1, description="Beams of a translation by default.")
    max_new_tokens: PositiveInt | None = Field(
        None, description="Longest translation, in tokens; default: data.max_target_length."
    )
    follow: Annotated[str, Field(pattern=r"^@?[a-z0-9][a-z0-9._-]{0,127}$")] | None = Field(
        None,
        description="Serve what this stands for, whenever it changes: latest, best, or an alias like production.",
    )
    follow_interval_s: Annotated[float, Field(ge=0.5, le=3600)] = Field(
        3.0, description="Seconds between two looks at the followed reference."
    )
    rollout: RolloutConfig = Field(
        default_factory=RolloutConfig, description="When a new version is refused, or taken back."
    )
    tensor_parallel_degree: PositiveInt = Field(
        1,
        description="Workers of one replica over which each layer is cut; ray_actor_options are those of each.",
    )
    pipeline_parallel_degree: PositiveInt = Field(
        1, description="Workers of one replica over which the layers are spread, as stages."
    )
    rank_timeout_s: PositiveFloat = Field(
        6.0, description="Seconds after which a worker of a replica that does not answer counts as lost."
    )
    bulk: BulkConfig = Field(default_factory=BulkConfig, description="Large requests, spread over all replicas.")

    @model_validator(mode="after")
    def _one_reference(self) -> Self:
        if self.ref is not None and self.follow is not None:
            raise ValueError(
                f"ref {self.ref!r} pins a version and follow {self.follow!r} moves it: leave one of them out"
            )
        return self
