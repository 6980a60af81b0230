"""Layouts: the mesh of the workers, and what it does to a model. Plain torch."""

from eagleray.parallel.apply import Fill, apply_layout, check_supported
from eagleray.parallel.mesh import DataCoordinate, build_mesh, data_coordinate
from eagleray.parallel.options import ParallelOptions
from eagleray.parallel.plan import ParallelPlan
from eagleray.parallel.shard import gathered

__all__ = [
    "DataCoordinate",
    "Fill",
    "ParallelOptions",
    "ParallelPlan",
    "apply_layout",
    "build_mesh",
    "check_supported",
    "data_coordinate",
    "gathered",
]
