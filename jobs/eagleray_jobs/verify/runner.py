"""Trains a file in one process and in layouts, on local groups of processes, and compares them."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

from eagleray.config.layout import Layout
from eagleray.config.schema import RunConfig
from eagleray.errors import ConfigError
from eagleray_jobs.data.dataset import PreparedData
from eagleray_jobs.train.schedule import num_steps
from eagleray_jobs.verify import rank
from eagleray_jobs.verify.compare import Comparison, Optim, judge
from eagleray_jobs.verify.layouts import SINGLE, config_in
from eagleray_jobs.verify.ranks import DeviceType, RankGroup, RanksFailed

Options = Mapping[str, Any] | None
REFERENCE_TIMEOUT_S = 3600.0
MIN_TIMEOUT_S = 120.0
SLOWDOWN = 20.0
"""How many times longer than one process a worker's share may take: a layout sends what one process need not."""


class Runner:
    """One file, trained once by one process, and in any number of layouts.

    Args:
        config: The file, as `config_for_check` made it.
        data: Its prepared rows.
        groups: Gives the processes of a world size.
        device_type: Where they compute.
    """

    def __init__(
        self,
        config: RunConfig,
        data: PreparedData,
        groups: Callable[[int], RankGroup],
        device_type: DeviceType = "cpu",
    ) -> None:
        assert config.train is not None
        self._optim: Optim = config.train.optim
        self._groups = groups
        self._folder = tempfile.TemporaryDirectory(prefix="eagleray-verify-")
        self._path = str(Path(self._folder.name) / "reference.safetensors")
        of_run = num_steps(config.train, len(data.split("train")))
        max_steps = max(of_run, config.train.stop_at_step or of_run)  # a run may be shorter than the check
        self._config = config
        self._single = rank.Assignment(
            config_in(config, SINGLE), SINGLE, data.store, data.fingerprint, max_steps, device_type
        )
        self._reference: rank.Reference | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._folder.cleanup()

    def refusals(self, layouts: Sequence[Layout], options: Options = None) -> Mapping[Layout, ConfigError]:
        """Return the layouts that the model or the file does not allow, and why."""
        parallel = self._config.parallel.model_copy(update=options)
        assignment = replace(self._single, config=self._config.model_copy(update={"parallel": parallel}))
        found = self._run(1, REFERENCE_TIMEOUT_S, rank.refusals, assignment, layouts)
        refused: Mapping[Layout, ConfigError] = found[0]
        return refused

    def train_reference(self) -> rank.Reference:
        """Train in one process, once.

        Raises:
            ConfigError: The file does not fit the model, or the model draws random numbers.
            WorkerError: The process raised or died.
        """
        if self._reference is None:
            found = self._run(1, REFERENCE_TIMEOUT_S, rank.train_reference, self._single, self._path)
            self._reference = found[0]
        return self._reference

    def compare(self, layout: Layout, fault: rank.Fault | None = None, options: Options = None) -> Comparison:
        """Train in a layout and compare it with one process.

        Args:
            layout: How the work is cut.
            fault: Makes the run wrong, to show that it is found.
            options: Further keys of `parallel`, in the place of the file's.

        Raises:
            ConfigError: The model or the file does not allow the layout.
            WorkerError: A rank raised, died or gave no answer; with its traceback.
        """
        reference, workers = self.train_reference(), layout.num_workers
        assignment = replace(self._single, config=config_in(self._config, layout, options), layout=layout)
        timeout_s = MIN_TIMEOUT_S + SLOWDOWN * workers * reference.seconds
        errors = self._run(workers, timeout_s, rank.measure_layout, assignment, self._path, fault)
        return judge(errors, reference.names, self._optim)

    def _run(self, world_size: int, timeout_s: float, function: Callable[..., Any], *args: Any) -> list[Any]:
        try:
            return self._groups(world_size).run(function, *args, timeout_s=timeout_s)
        except RanksFailed as failed:
            raise failed.as_error() from None
