"""How a layout is applied, apart from its degrees."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Self

from eagleray.config.schema import RunConfig

Schedule = Literal["GPipe", "1F1B", "Interleaved1F1B", "InterleavedZeroBubble", "ZBVZeroBubble"]
ActivationCheckpointing = Literal["none", "selective", "full"]


@dataclass(frozen=True, slots=True)
class ParallelOptions:
    """What the file says under `parallel` besides the degrees.

    Attributes:
        sequence_parallel: Whether tensor parallelism also cuts the residual stream along the sequence.
        activation_checkpointing: Whether layers keep their activations (`none`), those of matrix products
            (`selective`), or only their inputs (`full`) for the backward pass.
        reshard_after_forward: Whether FSDP frees the whole weights of a layer between forward and backward.
        cpu_offload: Whether FSDP keeps parameters, gradients and optimizer state in the host's memory.
        bf16: Whether FSDP gathers weights and computes in bfloat16, and reduces gradients in float32.
        schedule: The order in which a pipeline runs its micro-batches.
        num_microbatches: Parts of a rank's rows that go through a pipeline; None: twice as many as stages' ranks.
        split: Number of layers of each stage; None: by estimated cost.
        length: Tokens of a sequence that costs are estimated for.
    """

    sequence_parallel: bool = False
    activation_checkpointing: ActivationCheckpointing = "none"
    reshard_after_forward: bool = True
    cpu_offload: bool = False
    bf16: bool = False
    schedule: Schedule = "1F1B"
    num_microbatches: int | None = None
    split: tuple[int, ...] | None = None
    length: int = 128

    @classmethod
    def of(cls, config: RunConfig) -> Self:
        """Read the options of a file."""
        parallel = config.parallel
        return cls(
            sequence_parallel=parallel.sequence_parallel,
            activation_checkpointing=parallel.activation_checkpointing,
            reshard_after_forward=parallel.reshard_after_forward,
            cpu_offload=parallel.cpu_offload,
            bf16=config.train is not None and config.train.bf16,
            schedule=parallel.pipeline_parallel_schedule,
            num_microbatches=parallel.num_microbatches,
            split=None if parallel.pipeline_parallel_split is None else tuple(parallel.pipeline_parallel_split),
            length=config.data.max_source_length,
        )
