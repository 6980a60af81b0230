"""One HTTP request from its first to its last byte: who asks, what for, and what it took.

A visit is found through a context variable and not through arguments: what is handed on, cut into chunks or
translated from another dialect is accounted for without every place on its way knowing of it.
"""

from __future__ import annotations

import time
from contextvars import ContextVar
from dataclasses import dataclass, field

from eagleray_serving.keys import ApiKey
from eagleray_serving.schema import WireError


@dataclass(frozen=True, slots=True)
class Usage:
    """What a model did for a request, or for a part of it.

    Attributes:
        model: Name of the model.
        version: The version that answered.
        num_items: Items answered, those that failed included.
        num_tokens: Tokens of the input.
        lane: Interactive or bulk.
    """

    model: str
    version: str
    num_items: int
    num_tokens: int
    lane: str = "interactive"


@dataclass(slots=True)
class Visit:
    """A request while it is here.

    Attributes:
        id: Its id, the same in every process, log and retry.
        key: The key that it came with; None where nobody is asked for one.
        began: When it came, on the monotonic clock.
        used: What was done for it so far.
        is_admitted: Whether its key had tokens left; asked once, also of what is cut into parts.
    """

    id: str
    key: ApiKey | None = None
    began: float = field(default_factory=time.monotonic)
    used: list[Usage] = field(default_factory=list)
    is_admitted: bool = False

    def require(self, scope: str) -> None:
        """Refuse what the visit's key may not do.

        Raises:
            WireError: 403.
        """
        if self.key is not None and not self.key.may(scope):
            raise WireError(
                403,
                "not_allowed",
                f"the key {self.key.name} may not {scope}",
                f"it may {', '.join(self.key.scopes)}; make another with: eagleray keys add",
            )


_VISIT: ContextVar[Visit | None] = ContextVar("eagleray_visit", default=None)


def enter(visit: Visit) -> None:
    """Make a visit the one of this context and of the tasks that it starts."""
    _VISIT.set(visit)


def current_visit() -> Visit | None:
    """Return the visit that is being answered; None outside of one, such as behind a Serve handle."""
    return _VISIT.get()


def require(scope: str) -> None:
    """Refuse what the current visit's key may not do; what control routes begin with: `require("admin")`.

    Raises:
        WireError: 403.
    """
    visit = current_visit()
    if visit is not None:
        visit.require(scope)
