"""The training loop: one for every layout. It knows neither Ray nor how a model is cut."""

from __future__ import annotations

import logging
import math
import secrets
from collections.abc import Mapping
from contextlib import AbstractContextManager, ExitStack, closing
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from eagleray.config.schema import TrainConfig
from eagleray.errors import NonFiniteLossError
from eagleray.models.initialize import skeleton_of
from eagleray.models.plans import parallel_plan
from eagleray.models.sources import ModelInMemory, fill_from
from eagleray.parallel import (
    DataCoordinate,
    ParallelOptions,
    Pipeline,
    apply_layout,
    apply_pipeline,
    data_coordinate,
    gathered,
    gathered_bytes,
)
from eagleray.parallel.footprint import storage_bytes
from eagleray.projection import choose_before_projecting
from eagleray.store.runs import run_dir
from eagleray_jobs.data.cursor import Cursor
from eagleray_jobs.train.batches import Batches, Prefetch, StepBatch
from eagleray_jobs.train.evaluation import Evaluator
from eagleray_jobs.train.exchange import Exchange
from eagleray_jobs.train.lookout import Lookout, watched
from eagleray_jobs.train.memory import keep_heap_small
from eagleray_jobs.train.metrics import MetricWriter, Throughput, memory_bytes
from eagleray_jobs.train.optimizer import build_optimizer
from eagleray_jobs.train.parts import Parts
from eagleray_jobs.train.profile import Profile, profiled_steps
from eagleray_jobs.train.profiles import write_profile
from eagleray_jobs.train.progress import Due, Goal, Progress, due_after, out_of_patience, outcome_at_start
from eagleray_jobs.train.saving import Saves
from eagleray_jobs.train.schedule import learning_rate
from eagleray_jobs.train.spec import Control, LoopResult, MetricRecord, WorkerSpec
from eagleray_jobs.train.state import TrainState
from eagleray_jobs.train.step import StepResult, TrainStep

logger = logging.getLogger(__name__)

PASS_COST = 64
"""Tokens that a core computes while a pass does what it does once; about 5 ms with `configs/en-fr.yaml`.

A larger model takes longer for a token, and relatively less for a pass.
"""


def run_loop(spec: WorkerSpec, parts: Parts, control: Control) -> LoopResult:
    """Train until the run ends or is asked to stop; called on every rank together.

    `torch.distributed` is initialised by the caller, with a device of its own for each rank.

    Raises:
        NonFiniteLossError: On all ranks, naming the step, the rank and the last good checkpoint.
        ConfigError: The file asks for what the device, the layout or the task cannot do.
        StoreError: Three saves in a row failed.
        FencedError: The run was taken over by another owner.
        RanksMissingError: Another rank did not come within `train.ddp_timeout`, or went away; with where all are.
    """
    lookout = parts.lookout or Lookout(parts.exchange.broadcast(secrets.token_hex(4)))
    with closing(lookout), ExitStack() as opened, watched(lookout):  # asked before the loop is closed
        return opened.enter_context(closing(_Loop(spec, parts, control, lookout))).run()


class _Loop:
    def __init__(self, spec: WorkerSpec, parts: Parts, control: Control, lookout: Lookout) -> None:
        self.lookout = lookout
        config, coordinate = spec.train, data_coordinate(parts.mesh)
        self.reshard_after_forward = spec.config.parallel.reshard_after_forward
        self.config, self.max_steps, self.parts, self.control = config, spec.max_steps, parts, control
        self.spec = spec
        self.exchange = parts.exchange
        if config.torch_compile:
            parts.model.compile()  # in place: names stay, and DDP wraps what is compiled
        elif parts.device.type == "cpu":
            choose_before_projecting(parts.model)
        model = _cut(spec, parts)
        self.pipeline = model if isinstance(model, Pipeline) else None
        module = self.pipeline or parts.model
        keep_heap_small(parts.device.type, gathered_bytes(module))
        if parts.probe is not None:
            parts.probe.cut(module)
        optimizer = build_optimizer(module, config)
        computes = coordinate
        if self.pipeline is not None:  # the last stage need not be on the last rank
            counts = self.pipeline.holds_last and parts.mesh.get_local_rank("tp") == 0
            computes = replace(coordinate, counts=counts)
        self.profile = _build_profile(spec, parts)
        self.timeline = self.profile.timeline
        self.step = TrainStep(
            model, parts.task, optimizer, config, self.exchange, computes, parts.device, parts.probe, self.timeline
        )
        self.state = TrainState(module, optimizer, self.step.scaler, spec.config.model.adapter)
        self.batches = _build_batches(spec, parts, coordinate, whole=self.pipeline is not None)
        self.prefetch = Prefetch(self.batches, spec.max_steps, timeout_s=config.ddp_timeout)
        self.goal = Goal.of(config, parts.task.best_metric)
        # In a pipeline every rank has the whole model while it is evaluated, and answers rows of its own.
        answers = coordinate if self.pipeline is None else _every_rank(self.exchange)
        self.evaluator = _build_evaluator(config, parts, answers, self.exchange)
        self.is_first = self.exchange.rank == 0
        last_ref = parts.resume.ref if parts.resume is not None else None
        prune = parts.prune if self.is_first else None
        self.saves = Saves(parts.saver, control, last_ref, prune, self.exchange.meet)
        self.copies_saves: bool | None = None
        self.throughput = Throughput()
        self.metrics: MetricWriter | None = None

    def run(self) -> LoopResult:
        progress = self.restore()
        outcome = outcome_at_start(self.config, progress, self.max_steps)
        self.choose_profile(progress.step)
        with closing(self.prefetch):
            while outcome is None:
                self.lookout.doing(f"step {progress.step + 1}")
                self.profile.begin(progress.step + 1)
                with self.timeline.span("data"):
                    batch = self.prefetch.take(progress.step + 1)
                rate = learning_rate(self.config, batch.step, self.max_steps)
                result = self.take_step(batch, rate)
                progress = progress.after_step(batch.num_examples)
                due = self.due(progress.step, result)
                if due.evaluate:
                    progress = self.evaluate(progress)
                if due.log:
                    self.log(batch, rate, result, progress)
                outcome = due.outcome or out_of_patience(self.config, progress)
                if due.save or outcome:
                    self.save(progress, is_last=outcome is not None)
                self.profile.end(progress.step)
        self.profile.finish()
        self.lookout.doing("end")
        self.saves.finish()
        return LoopResult(
            outcome, progress.step, self.saves.last_ref, progress.scores, progress.best_score, progress.best_step
        )

    def restore(self) -> Progress:
        resume = self.parts.resume
        progress = Progress() if resume is None else self.state.restore(resume, self.exchange.group)
        if self.is_first:
            self.metrics = MetricWriter(self.parts.sinks(progress.step))
        return progress

    def choose_profile(self, step: int) -> None:
        given = self.config.profile_steps
        if given is not None or self.spec.profile is not None:
            self.profile.choose(profiled_steps(given, step, self.max_steps))

    def take_step(self, batch: StepBatch, rate: float) -> StepResult:
        stop, saving = self.control.stop_requested(), self.saves.in_flight()
        collate_next = partial(self.prefetch.begin, batch.step + 1)
        try:
            result = self.step.run(batch, rate, stop=stop, saving=saving, meanwhile=collate_next)
        except NonFiniteLossError as error:
            raise self.with_last_good(error) from error
        self.saves.settle(any_in_flight=result.totals.saving)
        self.throughput.add(batch.num_examples, batch.num_tokens)
        return result

    def due(self, step: int, result: StepResult) -> Due:
        can_evaluate = self.evaluator is not None
        due = due_after(self.config, step, self.max_steps, stop=result.totals.stop, can_evaluate=can_evaluate)
        if due.log or due.evaluate or due.save:
            self.check_gradient(step, result)
        return due

    def evaluate(self, progress: Progress) -> Progress:
        assert self.evaluator is not None
        self.lookout.doing(f"evaluation after step {progress.step}")
        self.step.release_gradients()
        with self.timeline.span("evaluate"), self.throughput.paused(), self.whole_model() as model:
            scores = self.evaluator.run(model, progress.step)
        return progress.after_evaluation(scores, self.goal)

    def whole_model(self) -> AbstractContextManager[nn.Module]:
        if self.pipeline is not None:
            return self.pipeline.gathered()
        return gathered(self.parts.model, reshard_after_forward=self.reshard_after_forward)

    def log(self, batch: StepBatch, rate: float, result: StepResult, progress: Progress) -> None:
        if self.metrics is None:
            return
        examples_per_s, tokens_per_s = self.throughput.take()
        record = MetricRecord(
            step=batch.step,
            epoch=self.batches.cursor.epoch(batch.step),
            loss=result.totals.mean_loss,
            learning_rate=rate,
            grad_norm=float(result.grad_norm),
            examples_per_s=examples_per_s,
            tokens_per_s=tokens_per_s,
            memory_bytes=memory_bytes(self.parts.device),
            scores=progress.current_scores,
        )
        self.metrics.write(record)
        self.control.log(record)

    def save(self, progress: Progress, *, is_last: bool) -> None:
        self.lookout.doing(f"save of step {progress.step}")
        self.step.release_gradients()  # a save copies weights and optimizer state, if steps are to follow
        with self.timeline.span("save"):
            tensors = self.state.tensors()
            copy = not is_last and self.saves_are_copied(tensors)
            self.saves.start(
                step=progress.step,
                tensors=tensors,
                files=self.parts.files,
                state=self.state.record(progress),
                metrics=progress.current_scores or {},
                # A run that goes on from here does not repeat these steps: their records must be there.
                before_commit=None if self.metrics is None else self.metrics.flush,
                copy=copy,
            )
            if not copy and not is_last:  # the next step changes them
                self.saves.finish()

    def saves_are_copied(self, tensors: Mapping[str, Tensor]) -> bool:
        """Say whether steps go on during saves: where a copy has no room on a rank, they wait.

        Found out at the first save of a run, by all ranks. Tensors on a GPU are copied to the host in any case.
        """
        if self.copies_saves is None:
            has_room = self.parts.device.type != "cpu" or self.parts.has_room(storage_bytes(tensors.values()))
            self.copies_saves = self.exchange.sum([not has_room])[0] == 0
            if not self.copies_saves and self.is_first:
                logger.warning(
                    "steps wait for saves: a copy of what is saved has no room within "
                    "resources.worker_memory_limit_bytes"
                )
        return self.copies_saves

    def check_gradient(self, step: int, result: StepResult) -> None:
        """Before anything is shown or stored: the gradient of a finite loss can spoil the weights, too."""
        if self.step.scaler.is_enabled() or math.isfinite(float(result.grad_norm)):
            return
        raise self.with_last_good(NonFiniteLossError(f"the gradient of step {step} is not finite"))

    def with_last_good(self, error: NonFiniteLossError) -> NonFiniteLossError:
        self.saves.finish()
        good = self.saves.last_ref or "none was committed yet"
        hint = f"the last good checkpoint: {good}; a lower train.learning_rate or train.max_grad_norm may help"
        return NonFiniteLossError(error.message, hint)

    def close(self) -> None:
        if not self.lookout.has_asked:  # a save in flight would wait for the ranks that are missing
            self.saves.close()
        if self.metrics is not None:  # after the saves, which commit behind their metrics
            self.metrics.close()
        self.exchange.close()


def _cut(spec: WorkerSpec, parts: Parts) -> nn.Module:
    """Apply the layout; a pipeline's stages are new."""
    model, plan, options = parts.model, parallel_plan(parts.model), ParallelOptions.of(spec.config)
    mesh, device, fill = parts.mesh, parts.device, parts.fill
    if spec.layout.pipeline == 1:
        return apply_layout(model, spec.layout, mesh, device, plan=plan, options=options, fill=fill)
    if fill is None:
        model, fill = skeleton_of(model), partial(fill_from, ModelInMemory(model))
    loss = parts.task.loss
    return apply_pipeline(model, spec.layout, mesh, device, plan=plan, options=options, loss=loss, fill=fill)


def _build_profile(spec: WorkerSpec, parts: Parts) -> Profile:
    run = spec.run
    about = {"run": f"{run.name}@r{run.run}", "layout": str(spec.layout)}
    write = partial(write_profile, run.store, run_dir(run.name, run.run), about)
    collectives = spec.profile != "passes"
    return Profile(parts.exchange, parts.mesh, parts.device, write, collectives=collectives)


def _every_rank(exchange: Exchange) -> DataCoordinate:
    return DataCoordinate(rank=exchange.rank, world=exchange.world_size)


def _build_batches(spec: WorkerSpec, parts: Parts, coordinate: DataCoordinate, *, whole: bool) -> Batches:
    config = spec.train
    lengths = parts.train.lengths if config.group_by_length else None
    return Batches(
        Cursor(len(parts.train), config.global_batch_size, config.seed, lengths),
        parts.train,
        parts.task,
        parts.processor,
        coordinate,
        max_rows=None if whole else config.per_device_train_batch_size,
        pass_cost=_pass_cost(spec, parts.device),
        pin_memory=parts.device.type == "cuda",
    )


def _pass_cost(spec: WorkerSpec, device: torch.device) -> int | None:
    """Return what a further pass costs in tokens, where one may pay.

    On a GPU a pass of few rows takes as long as one of many; where parameters are cut, each pass exchanges some.
    """
    layout, config = spec.layout, spec.train
    is_alone = layout.shard == layout.tensor == layout.pipeline == 1
    can_pay = config.cut_by_length and not config.torch_compile and device.type == "cpu" and is_alone
    return PASS_COST if can_pay else None


def _build_evaluator(
    config: TrainConfig, parts: Parts, coordinate: DataCoordinate, exchange: Exchange
) -> Evaluator | None:
    if parts.validation is None or not len(parts.validation):
        return None
    return Evaluator(
        parts.task,
        parts.processor,
        parts.validation,
        exchange,
        coordinate,
        parts.device,
        batch_size=config.per_device_eval_batch_size,
        max_examples=config.max_eval_examples,
        seed=config.seed,
    )
