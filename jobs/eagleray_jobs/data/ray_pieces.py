"""Runs the encoding of pieces in parallel, with Ray Data."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from eagleray_jobs.data.prepare import EncodePiece, PieceResult, run_in_line
from eagleray_jobs.data.rows import Piece

FEWEST_PIECES = 8
"""Below it the work is done before the processes that share it have started."""


def run_with_ray(encode: EncodePiece, pieces: Sequence[Piece]) -> Iterable[PieceResult]:
    """Encode pieces on all CPUs of the connected cluster; a few of them in this process.

    Returns:
        The results, in the order of the pieces.
    """
    if len(pieces) < FEWEST_PIECES:
        return run_in_line(encode, pieces)
    import ray

    from eagleray_jobs.ray_map import map_on_actors

    num_cpus = int(ray.cluster_resources().get("CPU", 1))
    return map_on_actors(_MakeEncoder(encode), list(enumerate(pieces)), max_workers=num_cpus)


@dataclass(frozen=True)
class _MakeEncoder:
    encode: EncodePiece

    def __call__(self) -> Callable[[tuple[int, Piece]], PieceResult]:
        return lambda item: self.encode(*item)
