"""Every exception that a user can meet.

::

    EaglerayError                     exit 1   what happened, the value, the limit; `hint`: what to do
    |-- UsageError                    exit 2   the call is wrong
    |   |-- ConfigError                        the file is wrong
    |   |-- ResourceError                      more was asked for than the cluster has
    |   |-- StoreURIError                      not a store location, or a hostile one
    |   `-- RunChangedError                    the name holds a run made by a different file
    |-- DataError                     exit 1   a row, a file or a split of the data cannot be used
    |-- StoreError                    exit 1   the store refused, stalled or is not shared
    |   |-- NotFoundError                      no such object, version, alias or run
    |   |-- AlreadyExistsError                 a create-only object exists
    |   |-- CheckpointDamagedError             a byte is not what the manifest says
    |   |-- OwnerAliveError                    somebody else is training this name
    |   |-- FencedError                        this run was taken over; it may no longer commit
    |   `-- PeersLostError                     a rank did not take part in a save in time
    |-- RunFailedError                exit 1   training, evaluation or prediction ended without its result
    |   |-- WorkerError                        a worker raised or died
    |   |-- WorkerMemoryError                  a worker needed more memory than it may have
    |   `-- NonFiniteLossError                 the loss became NaN or infinite
    |-- ServingError                  exit 1   a server could not be started, reached or stopped
    |   |-- RequestTimeoutError                no answer within the time of the request
    |   |-- ModelStoppedError                  the model was stopped before it answered
    |   |   `-- RanksLostError                 a process that holds a part of the model is gone
    |   `-- ModelStuckError                    a replica's model can answer nobody any more
    `-- InterruptedRunError           exit 130 or 143   stopped by a signal, after committing
"""

from __future__ import annotations

from typing import ClassVar


class EaglerayError(Exception):
    """An error that a user can act on.

    Args:
        message: What happened, with the offending value and the limit.
        hint: What to do about it.
    """

    exit_code: ClassVar[int] = 1

    def __init__(self, message: str, hint: str | None = None) -> None:
        # Both go to `args`, so that the error survives pickling between Ray processes.
        super().__init__(message, hint)
        self.message = message
        self.hint = hint

    @property
    def code(self) -> str:
        """A stable machine-readable name: `CheckpointDamagedError` is `checkpoint_damaged`."""
        name = type(self).__name__.removesuffix("Error")
        return "".join(f"_{c.lower()}" if c.isupper() and i else c.lower() for i, c in enumerate(name))

    def __str__(self) -> str:
        return self.message if self.hint is None else f"{self.message}\n  {self.hint}"


class UsageError(EaglerayError):
    """The call is wrong."""

    exit_code = 2


class ConfigError(UsageError):
    """The file is wrong."""


class ResourceError(UsageError):
    """More was asked for than the cluster has."""


class StoreURIError(UsageError):
    """Not a store location, or a hostile one."""


class RunChangedError(UsageError):
    """The name holds a run that was made by a different file."""


class DataError(EaglerayError):
    """A row, a file or a split of the data cannot be used."""


class StoreError(EaglerayError):
    """The store refused, stalled or is not shared."""


class NotFoundError(StoreError):
    """No such object, version, alias or run."""


class AlreadyExistsError(StoreError):
    """A create-only object exists."""


class CheckpointDamagedError(StoreError):
    """A byte of a checkpoint is not what its manifest says."""


class OwnerAliveError(StoreError):
    """Somebody else is training this name."""


class FencedError(StoreError):
    """This run was taken over by another owner and may no longer commit."""


class PeersLostError(StoreError):
    """A rank did not take part in a save in time; the group of processes is of no more use."""


class RunFailedError(EaglerayError):
    """Training, evaluation or prediction ended without its result."""


class WorkerError(RunFailedError):
    """A worker raised or died."""


class WorkerMemoryError(RunFailedError):
    """A worker needed more memory than there is, or than it may have."""


class NonFiniteLossError(RunFailedError):
    """The loss became NaN or infinite."""


class ServingError(EaglerayError):
    """A server could not be started, reached or stopped."""


class RequestTimeoutError(ServingError):
    """There was no answer within the time of the request."""


class ModelStoppedError(ServingError):
    """The model was stopped before it answered."""


class RanksLostError(ModelStoppedError):
    """A process that holds a part of the model is gone; what was asked may be asked again elsewhere."""


class ModelStuckError(ServingError):
    """A replica's model can answer nobody any more; the replica is to be replaced."""


class InterruptedRunError(EaglerayError):
    """Stopped by a signal, after committing.

    Args:
        message: What was committed and how to go on.
        signal_number: 2 (SIGINT, exit status 130) or 15 (SIGTERM, exit status 143).
    """

    def __init__(self, message: str, signal_number: int = 2) -> None:
        super().__init__(message)
        self.args = (message, signal_number)
        self.signal_number = signal_number
        self.exit_code = 128 + signal_number  # type: ignore[misc]
