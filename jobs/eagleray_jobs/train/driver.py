"""The driver of a training run: claim it, prepare the data, launch the workers, watch them, report."""

from __future__ import annotations

import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from importlib import import_module
from typing import IO, TYPE_CHECKING, Any, Literal

from eagleray.cluster import Cluster, connect
from eagleray.config.crosschecks import layout_of
from eagleray.config.layout import Layout
from eagleray.config.schema import RunConfig, TrainConfig
from eagleray.errors import ConfigError, InterruptedRunError, RunFailedError, WorkerMemoryError
from eagleray.hub import hash_checkpoint, locate_pretrained
from eagleray.resources import ResourceRequest
from eagleray.scheduling import giving_way
from eagleray.store.claim import Finished, RunClaim, claim_run
from eagleray.store.decide import Contents, Outcome
from eagleray.store.objects import ObjectStore
from eagleray.store.runs import RunHandle, run_dir
from eagleray.user_code import add_code
from eagleray_jobs.data.rows import Source
from eagleray_jobs.data.sources import open_source
from eagleray_jobs.train.board import Phase, open_board
from eagleray_jobs.train.failures import find_fatal, merge, spell_ranks
from eagleray_jobs.train.launch import build_trainer, environment
from eagleray_jobs.train.memory import ended_for_memory, kernel_kills
from eagleray_jobs.train.preflight import check_gpus, workers_request
from eagleray_jobs.train.progress import Goal
from eagleray_jobs.train.report import TrainReport, next_commands
from eagleray_jobs.train.schedule import num_steps
from eagleray_jobs.train.spec import LoopResult, WorkerSpec
from eagleray_jobs.train.stopping import StopAtOnce, StopSignal, stop_signals
from eagleray_jobs.train.view import Snapshot, View, open_view

if TYPE_CHECKING:
    from eagleray_jobs.train.outlook import Outlook

POLL_S = 1.0
BOARD_TIMEOUT_S = 30.0


@dataclass(frozen=True, slots=True)
class TrainOptions:
    """How a run is started, apart from what the file says.

    Attributes:
        address: Cluster to join; None: RAY_ADDRESS, else a local Ray.
        new_run: Begin a new run although the name holds one of another file.
        verbose: Leave Ray's own log lines on the terminal.
        stream: Where progress is shown.
        call: Arguments of `eagleray train` as they were typed, for the command to go on with.
        code: `code:` directories of other files that are trained on the same connection.
        profile: Record the timeline of some steps.
    """

    address: str | None = None
    new_run: bool = False
    verbose: bool = False
    stream: IO[str] = field(default_factory=lambda: sys.stderr)
    call: tuple[str, ...] = ()
    code: tuple[str, ...] = ()
    profile: bool = False


def train(config: RunConfig, options: TrainOptions, ray_stack: ExitStack | None = None) -> TrainReport:
    """Train what a file describes; an unfinished run of its name goes on from its last commit.

    Args:
        config: The file; `preflight.check` has passed.
        options: How it is started.
        ray_stack: Where the connection to Ray is left open for a next run; None: closed at the end.

    Raises:
        UsageError: The file, the store or the cluster do not fit what is asked for.
        RunFailedError: Workers failed more often than `train.max_failures`, or for a reason of their own.
        OwnerAliveError: Somebody else is training this name.
        InterruptedRunError: A second signal, or one before there was anything to commit.
    """
    with (
        ExitStack() as own_stack,
        giving_way(),  # with all that it starts; the workers come first
        stop_signals() as stop,
        open_view(options.stream, config.name) as view,
    ):
        try:
            return _Driver(config, options, view, stop, ray_stack or own_stack).run()
        except StopAtOnce as error:
            again = " ".join(("eagleray train", *options.call))
            message = f"{config.name}: stopped at once; what was committed before is kept\nnext:\n  {again}"
            raise InterruptedRunError(message, error.signal_number) from None


class _Driver:
    """One run from the driver's side; each method is one phase of it."""

    def __init__(
        self, config: RunConfig, options: TrainOptions, view: View, stop: StopSignal, ray_stack: ExitStack
    ) -> None:
        if config.train is None or config.store is None:
            raise ConfigError(f"{config.name}: the file has no `train` section, or no store")
        self.config, self.options, self.view, self.stop, self.ray_stack = config, options, view, stop, ray_stack
        self.train_config: TrainConfig = config.train
        self.layout: Layout = layout_of(config)
        self.store = ObjectStore.open(config.store)
        self.goal = Goal("loss", greater_is_better=False)
        self.snapshot = Snapshot(0, self.train_config.global_batch_size, "claim", time.monotonic())
        self.num_events = 0
        self.outlook: Outlook | None = None

    def run(self) -> TrainReport:
        add_code(self.config.code)
        claim = claim_run(
            self.store,
            self.config,
            new_run=self.options.new_run,
            hash_contents=self._contents,
            notify=self.view.note,
        )
        if isinstance(claim, Finished):
            return self._already_finished(claim)
        with claim:
            report = self._report(self._train_within_memory(claim), claim.handle)
            ended = Outcome.FINISHED if report.is_complete else Outcome.INTERRUPTED
            claim.finish(ended, report.as_json())
        return report

    @cached_property
    def source(self) -> Source:
        """The data, read through once for what is in it."""
        return open_source(self.config.data)

    def _contents(self) -> Contents:
        """What is in the data and in the pretrained model, wherever they lie."""
        model = self.config.model
        pretrained = None if model.pretrained is None else hash_checkpoint(locate_pretrained(model))
        return Contents(self.source.content, pretrained)

    def _train_within_memory(self, claim: RunClaim) -> LoopResult:
        """Train; where memory was out, say what the workers needed and which keys would help."""
        try:
            return self._train(claim)
        except WorkerMemoryError as error:
            needs = None if self.outlook is None else self.outlook.needs()
            raise WorkerMemoryError(error.message, None if needs is None else needs.hint()) from error

    def _train(self, claim: RunClaim) -> LoopResult:
        self._enter("start Ray")
        options, config = self.options, self.config
        code = list(dict.fromkeys((*config.code, *options.code)))
        with _importing("eagleray_jobs.train.groundwork"):
            cluster = self.ray_stack.enter_context(
                connect(options.address, code=code, verbose=options.verbose, notify=self.view.note)
            )
        use_gpu = self._use_gpu(cluster)
        check_gpus(config, cluster.where, has_gpus=use_gpu)
        request = workers_request(config, self.layout, use_gpu=use_gpu)
        cluster.require(request, config.resources.wait_s, self.view.note)
        self._enter("prepare data")
        spec = self._prepare(claim, cluster)
        self.stop.at_once = False  # from here on there are workers, who commit before they end
        self._enter("start workers")
        return self._fit(claim, cluster, spec, request)

    def _use_gpu(self, cluster: Cluster) -> bool:
        use_gpu = self.config.resources.use_gpu
        return any(node.get("GPU", 0) > 0 for node in cluster.nodes()) if use_gpu == "auto" else use_gpu

    def _prepare(self, claim: RunClaim, cluster: Cluster) -> WorkerSpec:
        from eagleray_jobs.train.groundwork import lay

        found = lay(self.config, self.layout, self.store, self.source, cluster, self.view.note)
        self.goal, self.outlook = Goal.of(self.train_config, found.best_metric), found.outlook
        max_steps = num_steps(self.train_config, found.num_examples)
        self.snapshot = replace(self.snapshot, max_steps=max_steps)
        profile: Literal["collectives"] | None = "collectives" if self.options.profile else None
        return WorkerSpec(self.config, claim.handle, found.fingerprint, self.layout, max_steps, profile)

    def _fit(self, claim: RunClaim, cluster: Cluster, spec: WorkerSpec, request: ResourceRequest) -> LoopResult:
        from eagleray_jobs.train.worker import train_on_worker

        board, kills_before = open_board(cluster.node_id()), kernel_kills()
        is_local, train = cluster.is_local, self.train_config
        with (
            environment(is_local=is_local),
            tempfile.TemporaryDirectory(prefix="eagleray-train-") as scratch,
        ):
            payload = {"spec": spec, "board": board}
            fit = _Fit(
                build_trainer(train_on_worker, payload, self.config, train, request, scratch, is_local=is_local)
            )
            cluster.quiet()
            fit.start()
            self._watch(fit, claim, board)
        return _outcome(fit.error, board, cluster, kernel_kills() - kills_before)

    def _watch(self, fit: _Fit, claim: RunClaim, board: Any) -> None:
        is_stopping, is_over = False, False
        while not is_over:
            is_over = not fit.is_alive()
            self._show_new(board)
            for line in () if self.outlook is None else self.outlook.lines():
                self.view.note(line)
            if self.stop.number is not None and not is_stopping:
                is_stopping = True
                claim.request_stop()
                self.view.note("stopping: the workers commit and end; once more stops at once")
            fit.join(POLL_S)

    def _show_new(self, board: Any) -> None:
        import ray

        try:
            events = ray.get(board.read.remote(self.num_events), timeout=BOARD_TIMEOUT_S)
        except ray.exceptions.GetTimeoutError:
            return  # a busy machine; whether the run goes on is not the board's to say
        for posted in events:
            self.num_events += 1
            self.snapshot = self.snapshot.after(posted.event, posted.at_s, self.goal)
            self.view.show(self.snapshot, posted.event)
        self.view.show(self.snapshot, None)

    def _enter(self, phase: str) -> None:
        self.snapshot = self.snapshot.enter(phase, time.monotonic())
        self.view.show(self.snapshot, Phase(phase))

    def _report(self, result: LoopResult, run: RunHandle) -> TrainReport:
        from eagleray_jobs.train.profiles import find_profiles

        snapshot = self.snapshot.enter("end", time.monotonic())
        is_stopped = result.outcome == "stopped"
        return TrainReport(
            name=self.config.name,
            outcome=result.outcome,
            ref=result.ref,
            step=result.step,
            max_steps=snapshot.max_steps,
            store=self.store.location,
            num_workers=self.layout.num_workers,
            scores=result.scores,
            best_step=result.best_step,
            best_score=result.best_score,
            restarts=snapshot.restarts,
            phases_s=snapshot.phases_s,
            profiles=find_profiles(self.store, run_dir(run.name, run.run)),
            next_commands=next_commands(self.config.name, result.outcome, self.options.call),
            signal_number=(self.stop.number or int(signal.SIGTERM)) if is_stopped else None,
        )

    def _already_finished(self, finished: Finished) -> TrainReport:
        known = TrainReport.from_json(finished.report)
        return replace(
            known,
            outcome="already_finished",
            ref=finished.ref,
            phases_s={},
            next_commands=next_commands(self.config.name, "already_finished", self.options.call),
        )


@contextmanager
def _importing(module: str) -> Iterator[None]:
    """Import a module in a thread meanwhile; whoever uses it imports it again, and is told of what went wrong."""

    def begin() -> None:
        with suppress(Exception):
            import_module(module)

    thread = threading.Thread(target=begin, name="imports")
    thread.start()
    try:
        yield
    finally:
        thread.join()


class _Fit(threading.Thread):
    """`fit` outside the main thread, where it would put its own SIGINT handler over ours."""

    def __init__(self, trainer: Any) -> None:
        super().__init__(name="fit", daemon=True)
        self._trainer = trainer
        self.error: Exception | None = None

    def run(self) -> None:
        try:
            self._trainer.fit()
        except Exception as error:  # the driver makes an error of ours of it
            self.error = error


def _outcome(error: Exception | None, board: Any, cluster: Cluster, num_kills: int) -> LoopResult:
    """Return the loop's result, or raise what ended it.

    Args:
        error: What Ray Train raised.
        board: What ranks posted.
        cluster: Where the logs are.
        num_kills: Processes that this machine's out-of-memory killer has ended meanwhile.

    Raises:
        EaglerayError: A rank's own error, or one made of those of several ranks.
    """
    import ray

    result: LoopResult | None = ray.get(board.result.remote(), timeout=BOARD_TIMEOUT_S)
    if error is None and result is not None:
        return result
    failures = ray.get(board.failures.remote(), timeout=BOARD_TIMEOUT_S)
    deaths = getattr(error, "worker_failures", {})
    dead = set(deaths) - {failure.world_rank for failure in failures}
    said = ended_for_memory((str(deaths[rank]) for rank in sorted(dead)), num_kills)
    if dead and said is not None and not find_fatal(failures):
        raise WorkerMemoryError(f"the process of {spell_ranks(sorted(dead))} was ended: {said}")
    logs = f"Ray's own logs, with what the workers printed, are in {cluster.log_dir}"
    if failures or dead:
        raise merge(failures, dead, logs)
    raise RunFailedError(f"Ray Train ended without a result: {error}", logs)
