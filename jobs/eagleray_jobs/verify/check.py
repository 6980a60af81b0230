"""From a file to the report of `verify`: rows, reference, one layout after the other."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from eagleray.config.crosschecks import layout_of
from eagleray.config.layout import Layout
from eagleray.config.schema import RunConfig
from eagleray.errors import ConfigError, RunFailedError
from eagleray.user_code import add_code
from eagleray_jobs.verify.data import prepared_rows
from eagleray_jobs.verify.layouts import config_for_check, layouts_up_to
from eagleray_jobs.verify.ranks import DeviceType, RankGroups
from eagleray_jobs.verify.report import LayoutResult, VerifyReport
from eagleray_jobs.verify.runner import Runner

Notify = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class VerifyOptions:
    """What is verified.

    Attributes:
        layouts: Those that were named; None: all that are possible.
        num_steps: Optimizer steps.
        max_workers: Most workers of a layout that nobody named.
    """

    layouts: tuple[Layout, ...] | None = None
    num_steps: int = 5
    max_workers: int = 4


def verify(config: RunConfig, options: VerifyOptions, notify: Notify) -> VerifyReport:
    """Train a file in one process and in layouts, and compare them.

    Args:
        config: The file.
        options: Which layouts, how many steps.
        notify: Told what a user should see meanwhile.

    Raises:
        ConfigError: The file does not train, or a layout that was named is not possible; with the numbers.
        DataError: A file is missing, a row cannot be used, or there is nothing to train on.
        RunFailedError: One process alone cannot train it.
    """
    started = time.monotonic()
    checked, notes = config_for_check(config, options.num_steps)
    assert checked.train is not None
    layouts = options.layouts or tuple(layouts_up_to(options.max_workers))
    device = choose_device(config, max(layout.num_workers for layout in layouts))
    add_code(config.code)
    with (
        prepared_rows(config, notify) as data,
        RankGroups(checked.train.ddp_timeout, device) as groups,
        Runner(checked, data, groups, device) as runner,
    ):
        refused = dict(runner.refusals(layouts))
        _refuse_named(options, refused)
        reference = runner.train_reference()
        notify(f"{config.name}: one process took {reference.seconds:.1f} s")
        possible = [layout for layout in layouts if layout not in refused]
        results = _run_all(runner, groups, possible, refused, notify)
        _refuse_named(options, refused)
    if reference.dropout:
        notes = (*notes, f"dropout of up to {reference.dropout} in the model is switched off for the check")
    if (own := layout_of(config)).num_workers > 1 and str(own) not in [result.layout for result in results]:
        notes = (*notes, f"the layout of the file, {own}, is not among these")
    return VerifyReport(
        name=config.name,
        num_steps=options.num_steps,
        global_batch_size=checked.train.global_batch_size,
        optim=checked.train.optim,
        device=device,
        results=results,
        refused={str(layout): error.message for layout, error in refused.items()},
        notes=notes,
        seconds=time.monotonic() - started,
    )


def choose_device(config: RunConfig, num_workers: int) -> DeviceType:
    """Return where the ranks compute: on GPUs where each gets one and the file allows it."""
    if config.resources.use_gpu is False:
        return "cpu"
    import torch

    return "cuda" if torch.cuda.device_count() >= num_workers else "cpu"


def _refuse_named(options: VerifyOptions, refused: Mapping[Layout, ConfigError]) -> None:
    if options.layouts is not None and refused:
        raise next(iter(refused.values()))


def _run_all(
    runner: Runner,
    groups: RankGroups,
    layouts: Sequence[Layout],
    refused: dict[Layout, ConfigError],
    notify: Notify,
) -> list[LayoutResult]:
    results = []
    for number, layout in enumerate(layouts):
        started = time.monotonic()
        comparison, failure = None, None
        try:
            comparison = runner.compare(layout)
        except ConfigError as error:  # what only ranks can find out
            refused[layout] = error
            continue
        except RunFailedError as error:
            failure = str(error)
        results.append(LayoutResult(str(layout), comparison, failure, time.monotonic() - started))
        notify(f"{layout}: {results[-1].verdict} ({results[-1].seconds:.1f} s)")
        if layout.num_workers not in {later.num_workers for later in layouts[number + 1 :]}:
            groups.close(layout.num_workers)  # its memory is the next one's
    return results
