"""A pipeline's stage whose passes are recorded.

Imported by who runs a pipeline: torch's pipelines bring torch.compile along, and any other layout does without.
"""

from __future__ import annotations

from typing import Any

from torch.distributed.pipelining import PipelineStage

from eagleray.parallel.timeline import Timeline


class TimedStage(PipelineStage):
    """A stage as torch's schedules run it, whose passes are recorded."""

    def __init__(self, *args: Any, timeline: Timeline, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._timeline = timeline

    def forward_one_chunk(self, fwd_chunk_id: int, *args: Any, **kwargs: Any) -> Any:
        """Run the forward pass of a micro-batch; what it needs is there."""
        with self._timeline.span("forward", micro_batch=fwd_chunk_id, stage=self.stage_index):
            return super().forward_one_chunk(fwd_chunk_id, *args, **kwargs)

    def backward_one_chunk(self, bwd_chunk_id: int, *args: Any, **kwargs: Any) -> Any:
        """Run its backward pass, or the half that the stage before waits for."""
        with self._timeline.span("backward", micro_batch=bwd_chunk_id, stage=self.stage_index):
            return super().backward_one_chunk(bwd_chunk_id, *args, **kwargs)

    def backward_weight_one_chunk(self, bwd_chunk_id: int, *args: Any, **kwargs: Any) -> Any:
        """Run the other half."""
        with self._timeline.span("weights", micro_batch=bwd_chunk_id, stage=self.stage_index):
            return super().backward_weight_one_chunk(bwd_chunk_id, *args, **kwargs)
