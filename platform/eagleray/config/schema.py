"""The one file: a strict, frozen pydantic tree.

Training keys carry the names of Hugging Face `TrainingArguments` where the meaning is equal, parallel keys
TorchTitan's, the words under `resources` and `serve` Ray's. This module imports neither ray, torch nor
transformers, so that a file is validated in well under a second.
"""

from __future__ import annotations

import difflib
import re
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    AliasChoices,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from eagleray.config.builtin_tasks import BUILTIN_TASKS as BUILTIN_TASKS
from eagleray.config.model import AdapterConfig as AdapterConfig
from eagleray.config.model import ModelConfig as ModelConfig
from eagleray.config.model import TokenizerConfig as TokenizerConfig
from eagleray.config.section import IMPORT_PATH_PATTERN as IMPORT_PATH_PATTERN
from eagleray.config.section import NAME_PATTERN as NAME_PATTERN
from eagleray.config.section import Section as Section
from eagleray.config.serving import ServeConfig as ServeConfig

BUILTIN_SOURCES = ("cldr-en-fr", "cldr-langid", "digits")

Degree = PositiveInt | Literal["auto"]


class ParallelText(Section):
    """Plain text files whose line n is the translation of the other's line n."""

    source: str | list[str] = Field(description="Files of the source language: path, glob or store URI.")
    target: str | list[str] = Field(description="Files of the target language, in the same order.")


Files = str | list[str] | ParallelText


class DataConfig(Section):
    """Where the examples come from and how they are split and cut."""

    source: Literal["cldr-en-fr", "cldr-langid", "digits"] | None = Field(
        None, description="A bundled source that needs no network."
    )
    train: Files | None = Field(
        None,
        description="Training files: paths (relative to this file), globs or store URIs of .jsonl, .csv, .tsv or "
        ".parquet; or `{source: ..., target: ...}` of plain parallel text.",
    )
    validation: Files | None = Field(None, description="Validation files; else `validation_split`.")
    test: Files | None = Field(None, description="Test files; else `test_split`.")
    validation_split: float = Field(
        0.05, ge=0, lt=1, description="Share of the keys held out for validation where no file is given."
    )
    test_split: float = Field(
        0.05, ge=0, lt=1, description="Share of the keys held out for the test where no file is given."
    )
    split_key: str | None = Field(
        None, description="Column whose equal values stay in one split; default: the input."
    )
    languages: list[str] | None = Field(
        None, min_length=2, description="Languages of `cldr-langid`, as CLDR codes; default: its own list."
    )
    columns: dict[str, str] = Field(
        default_factory=dict,
        description="Your column for each of the task's: source, target; text, label; image, label.",
    )
    source_lang: str = Field("en", description="Language of the input of a translation.")
    target_lang: str = Field("fr", description="Language of the output of a translation.")
    labels: list[str] | None = Field(
        None,
        min_length=2,
        description="Class names in the order of their numbers; default: found in the data.",
    )
    max_source_length: PositiveInt = Field(128, description="Longest input, in tokens; longer ones are cut.")
    max_target_length: PositiveInt = Field(128, description="Longest target, in tokens; longer ones are cut.")
    on_bad_row: Literal["stop", "skip"] = Field(
        "stop", description="A row that cannot be used stops the preparation, or is skipped and counted."
    )

    @model_validator(mode="after")
    def _one_origin(self) -> Self:
        if self.source is not None and self.train is not None:
            raise ValueError("set either source or train (files); found both")
        if self.validation_split + self.test_split >= 1:
            raise ValueError(
                f"validation_split {self.validation_split} + test_split {self.test_split} leave nothing to train"
            )
        return self


class TrainConfig(Section):
    """How the model is trained. No key here depends on the number of workers."""

    max_steps: PositiveInt | None = Field(None, description="Optimizer steps of the whole run.")
    num_train_epochs: PositiveFloat | None = Field(None, description="Epochs of the run, instead of max_steps.")
    global_batch_size: PositiveInt = Field(
        64, description="Examples per optimizer step, over all workers and accumulation steps."
    )
    per_device_train_batch_size: PositiveInt | None = Field(
        None, description="Most examples in one forward pass of one worker; the rest is accumulated."
    )
    per_device_eval_batch_size: PositiveInt = Field(64, description="Examples in one evaluation batch.")
    optim: Literal["adamw", "sgd"] = Field("adamw", description="Optimizer.")
    learning_rate: NonNegativeFloat = Field(5e-5, description="Peak learning rate.")
    weight_decay: NonNegativeFloat = Field(
        0.0, description="Decoupled decay of matrices; norms and biases have none."
    )
    adam_beta1: float = Field(0.9, ge=0, lt=1, description="AdamW's decay of the first moment.")
    adam_beta2: float = Field(0.999, ge=0, lt=1, description="AdamW's decay of the second moment.")
    adam_epsilon: PositiveFloat = Field(1e-8, description="AdamW's term for numerical stability.")
    momentum: float = Field(0.0, ge=0, lt=1, description="SGD's momentum.")
    lr_scheduler_type: Literal["linear", "cosine", "constant", "inverse_sqrt"] = Field(
        "linear", description="Shape of the learning rate after the warm-up."
    )
    warmup_steps: NonNegativeFloat = Field(
        0.0, description="Steps of linear warm-up; a share of all steps when below 1."
    )
    learning_rate_scaling: Literal["none", "linear", "sqrt"] = Field(
        "none",
        description="How learning_rate grows with global_batch_size / learning_rate_reference_batch_size.",
    )
    learning_rate_reference_batch_size: PositiveInt | None = Field(
        None, description="The global batch size that learning_rate was tuned for."
    )
    max_grad_norm: PositiveFloat | None = Field(
        1.0, description="Gradients are clipped to this norm; null: never."
    )
    label_smoothing_factor: float = Field(0.0, ge=0, lt=1, description="Label smoothing.")
    bf16: bool = Field(False, description="bfloat16 autocast over float32 weights.")
    fp16: bool = Field(False, description="float16 autocast with loss scaling; GPUs only.")
    torch_compile: bool = Field(False, description="Compile the model with torch.compile.")
    group_by_length: bool = Field(
        False,
        description="Put examples of similar length into one batch; the order stays exact and resumable.",
    )
    cut_by_length: bool = Field(
        True,
        description=(
            "On CPUs that share no parameters: cut a worker's rows into passes of similar length where that saves "
            "padding. The result is the same; false: as few passes as per_device_train_batch_size allows."
        ),
    )
    logging_steps: PositiveInt = Field(10, description="Steps between two lines of metrics.jsonl.")
    eval_steps: PositiveInt | None = Field(
        None, description="Steps between two evaluations; null: only at the end."
    )
    save_steps: PositiveInt | None = Field(
        None, description="Steps between two checkpoints; null: only at the end."
    )
    save_total_limit: PositiveInt | None = Field(
        None, description="Newest checkpoints that are kept besides the best and the aliased ones; null: all."
    )
    metric_for_best_model: str | None = Field(
        None, description="Score of the evaluation that `best` goes by; default: the task's own."
    )
    greater_is_better: bool | None = Field(None, description="Direction of metric_for_best_model.")
    early_stopping_patience: PositiveInt | None = Field(
        None, description="Evaluations without improvement after which the run ends."
    )
    early_stopping_threshold: NonNegativeFloat = Field(0.0, description="Smallest change that is an improvement.")
    max_eval_examples: PositiveInt | None = Field(
        None, description="Validation examples per evaluation during training; null: all."
    )
    stop_at_step: PositiveInt | None = Field(
        None, description="Commit and stop at this step; the schedule still aims at max_steps."
    )
    max_failures: NonNegativeInt = Field(
        3, description="Restarts of the workers after failures before the run fails."
    )
    init_from: str | None = Field(None, description="Reference of a version whose weights the run starts from.")
    seed: NonNegativeInt = Field(0, le=2**63 - 1, description="Seed of weights, order and dropout.")
    report_to: list[Literal["tensorboard"]] = Field(
        default_factory=list, description="Further places that metrics go to."
    )
    profile_steps: list[PositiveInt] | None = Field(
        None,
        min_length=2,
        max_length=2,
        description="First and last step whose timeline on all workers is written into the run's folder, as a "
        "Chrome trace and as a picture; null: none, or with `--profile` three steps after the first five.",
    )
    ddp_timeout: PositiveFloat = Field(60.0, description="Seconds after which a collective without answer fails.")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if (self.max_steps is None) == (self.num_train_epochs is None):
            raise ValueError("set exactly one of max_steps and num_train_epochs")
        if self.bf16 and self.fp16:
            raise ValueError("set at most one of bf16 and fp16")
        if self.learning_rate_scaling != "none" and self.learning_rate_reference_batch_size is None:
            raise ValueError("learning_rate_scaling needs learning_rate_reference_batch_size")
        if (self.per_device_train_batch_size or 1) > self.global_batch_size:
            raise ValueError(
                f"per_device_train_batch_size {self.per_device_train_batch_size} is larger than "
                f"global_batch_size {self.global_batch_size}"
            )
        if self.profile_steps is not None and self.profile_steps[0] > self.profile_steps[1]:
            raise ValueError(f"profile_steps {self.profile_steps} end before they begin")
        if self.early_stopping_patience is not None and self.eval_steps is None:
            raise ValueError("early_stopping_patience needs eval_steps")
        return self


def _known_task(task: str) -> str:
    if task in BUILTIN_TASKS or re.fullmatch(IMPORT_PATH_PATTERN, task):
        return task
    near = difflib.get_close_matches(task, BUILTIN_TASKS, n=1, cutoff=0.6)
    guess = f"; did you mean {near[0]}?" if near else ""
    raise ValueError(f"{task!r} is not {', '.join(BUILTIN_TASKS)} or your own package.module:Task{guess}")


def _degree(long: str, short: str, description: str) -> Any:
    return Field(1, description=description, validation_alias=AliasChoices(long, short))


class ParallelConfig(Section):
    """How many ways the work is cut; the product is the number of workers."""

    data_parallel_replicate_degree: Degree = _degree(
        "data_parallel_replicate_degree", "dp_replicate_size", "Replicas of the model (DDP)."
    )
    data_parallel_shard_degree: Degree = _degree(
        "data_parallel_shard_degree", "dp_shard_size", "Shards of parameters and optimizer state (FSDP)."
    )
    tensor_parallel_degree: Degree = _degree("tensor_parallel_degree", "tp_size", "Cuts of each layer.")
    pipeline_parallel_degree: Degree = _degree("pipeline_parallel_degree", "pp_size", "Stages of layers.")
    sequence_parallel: bool = Field(
        False,
        description="Whether tensor parallelism also cuts norms and the residual stream, along the sequence.",
    )
    pipeline_parallel_schedule: Literal[
        "GPipe", "1F1B", "Interleaved1F1B", "InterleavedZeroBubble", "ZBVZeroBubble"
    ] = Field(
        "1F1B",
        description="Order in which a pipeline runs its micro-batches; the last three have two stages per rank.",
    )
    num_microbatches: PositiveInt | None = Field(
        None,
        description="Parts in which a data-parallel rank's rows go through the pipeline; null: twice the degree.",
    )
    pipeline_parallel_split: list[PositiveInt] | None = Field(
        None, description="Layers of each pipeline stage, encoder first; null: balanced by estimated cost."
    )
    activation_checkpointing: Literal["none", "selective", "full"] = Field(
        "none",
        description="What a layer computes again in the backward pass to save memory: nothing, everything but "
        "matrix products, or everything.",
    )
    reshard_after_forward: bool = Field(
        True,
        description="Whether FSDP frees a layer's gathered weights between its forward and its backward pass.",
    )
    cpu_offload: bool = Field(
        False,
        description="Whether FSDP keeps parameters, gradients and optimizer state on the host; for GPUs.",
    )


class ResourcesConfig(Section):
    """What the workers ask of the cluster."""

    use_gpu: bool | Literal["auto"] = Field("auto", description="One GPU per worker; auto: where there are any.")
    num_workers: PositiveInt | Literal["auto"] = Field(
        "auto", description="Workers; auto: the product of the degrees under `parallel`."
    )
    resources_per_worker: dict[str, NonNegativeFloat] = Field(
        default_factory=lambda: {"CPU": 1.0},
        description="Ray resources of one worker, for example `{CPU: 2}`.",
    )
    worker_memory_limit_bytes: PositiveInt | None = Field(
        None,
        description="Resident memory that one worker may hold of its own, in bytes, besides what is mapped from "
        "files; beyond it the run ends with what would help. null: what the machine has. (`memory` under "
        "`resources_per_worker` only reserves.)",
    )
    wait_s: NonNegativeFloat | None = Field(
        None,
        description="Seconds to wait for missing resources on a joined cluster; default: 600 where an autoscaler "
        "runs, else 0.",
    )


class RunConfig(Section):
    """The whole file."""

    name: str = Field(pattern=f"^{NAME_PATTERN}$", description="Name of the model and of its runs.")
    task: Annotated[str, AfterValidator(_known_task)] = Field(
        description="translation, text-classification, image-classification, or your own `package.module:Task`.",
        json_schema_extra={"pattern": f"^({'|'.join(BUILTIN_TASKS)}|{IMPORT_PATH_PATTERN})$"},
    )
    store: str | None = Field(
        None,
        min_length=1,
        description="Where checkpoints live: a local or shared directory (relative to the working directory), "
        "s3://bucket/prefix, gs://bucket/prefix; default: EAGLERAY_STORE, else ./store.",
    )
    code: list[str] = Field(
        default_factory=list,
        description="Your own packages (a package's directory, or one that holds packages and modules), relative "
        "to this file; they travel along.",
    )
    model: ModelConfig = Field(description="The model.")
    data: DataConfig = Field(
        default_factory=DataConfig,
        description="The examples; a file that only serves needs no more than their languages and lengths.",
    )
    train: TrainConfig | None = Field(None, description="How it is trained; a file that only serves needs none.")
    parallel: ParallelConfig = Field(default_factory=ParallelConfig, description="How the work is cut.")
    resources: ResourcesConfig = Field(default_factory=ResourcesConfig, description="What the workers ask for.")
    serve: ServeConfig = Field(default_factory=ServeConfig, description="How the model is served.")
