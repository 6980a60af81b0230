"""Layouts: the mesh of the workers, and what it does to a model. Plain torch."""

from eagleray.parallel.apply import apply_layout, apply_pipeline, check_device, check_layout, check_supported
from eagleray.parallel.local import Fill
from eagleray.parallel.mesh import DataCoordinate, build_mesh, data_coordinate
from eagleray.parallel.options import ParallelOptions
from eagleray.parallel.pipeline import Pipeline
from eagleray.parallel.plan import ParallelPlan, PipelineParts
from eagleray.parallel.shard import gathered, gathered_bytes

__all__ = [
    "DataCoordinate",
    "Fill",
    "ParallelOptions",
    "ParallelPlan",
    "Pipeline",
    "PipelineParts",
    "apply_layout",
    "apply_pipeline",
    "build_mesh",
    "check_device",
    "check_layout",
    "check_supported",
    "data_coordinate",
    "gathered",
    "gathered_bytes",
]
