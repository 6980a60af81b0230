"""Where every rank was when one of them no longer came: values that cross processes."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Whereabouts:
    """Where a rank is.

    Attributes:
        world_rank: The rank.
        doing: What its loop does, `step 5`; None: it gave no sign of life.
        collective: The last collective that it entered.
        waits: Whether it is still in there, waiting for other ranks.
        line: Where it is in Python, torch's own code left out.
    """

    world_rank: int
    doing: str | None
    collective: str | None = None
    waits: bool = False
    line: str | None = None

    def __str__(self) -> str:
        if self.doing is None:
            return f"rank {self.world_rank}: gave no sign of life"
        state = "waiting" if self.waits else "done"
        collective = self.collective and f"{self.collective} ({state})"
        parts = [f"rank {self.world_rank}: {self.doing}", collective, self.line and f"at {self.line}"]
        return ", ".join(part for part in parts if part)


class RanksMissingError(Exception):
    """A collective failed because another rank did not come, or went away.

    Attributes:
        whereabouts: Of all ranks, as far as they answered.
    """

    def __init__(self, message: str, whereabouts: tuple[Whereabouts, ...]) -> None:
        super().__init__(message, whereabouts)
        self.whereabouts = whereabouts

    def __str__(self) -> str:
        return "\n  ".join([str(self.args[0]), *map(str, self.whereabouts)])
