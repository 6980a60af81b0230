"""Layouts: the mesh of the workers, and what it does to a model. Plain torch."""

from eagleray.parallel.apply import apply_layout, check_supported
from eagleray.parallel.mesh import DataCoordinate, build_mesh, data_coordinate

__all__ = ["DataCoordinate", "apply_layout", "build_mesh", "check_supported", "data_coordinate"]
