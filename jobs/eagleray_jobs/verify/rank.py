"""What the ranks of `verify` run: the training loop for a few steps, and what it gave."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from eagleray.config.layout import Layout
from eagleray.config.schema import RunConfig
from eagleray.errors import ConfigError
from eagleray.models import build_unfilled
from eagleray.models.initialize import materialize, skeleton_of
from eagleray.models.plans import parallel_plan
from eagleray.parallel import ParallelOptions, build_mesh, check_layout, check_supported
from eagleray.parallel.gradients import whole
from eagleray.store.objects import ObjectStore
from eagleray.store.runs import RunHandle
from eagleray.store.saver import SaveResult
from eagleray.tasks import Processor, Task, load_task
from eagleray.tasks.base import move
from eagleray.user_code import add_code
from eagleray_jobs.data.dataset import PreparedData
from eagleray_jobs.train.exchange import Exchange
from eagleray_jobs.train.loop import run_loop
from eagleray_jobs.train.parts import Parts
from eagleray_jobs.train.spec import MetricRecord, WorkerSpec
from eagleray_jobs.verify.compare import Errors, Optim, Quantity, Trace, measure, names_of
from eagleray_jobs.verify.dropout import switch_off_dropout
from eagleray_jobs.verify.layouts import config_in

_MODEL_PREFIX = "model."
_SAME_LOSS = 1e-5
_PROBED_ROWS = 4


class Fault(Protocol):
    """Makes a run of the ranks wrong, to show that it is found. Called on every rank; picklable."""

    def parts(self, parts: Parts) -> Parts:
        """Change what the loop works on."""
        ...

    def cut(self, module: nn.Module) -> None:
        """Change what is trained, after the layout was applied to it."""
        ...

    def backward(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Change the gradients of a step before they are used."""
        ...


@dataclass(frozen=True, slots=True)
class Assignment:
    """What is trained.

    Attributes:
        config: The file, as `config_for_check` made it.
        layout: How it is cut.
        store: Where the prepared rows are.
        fingerprint: Which ones.
        max_steps: Steps that the learning rate's schedule aims at.
        device_type: Where the ranks compute.
    """

    config: RunConfig
    layout: Layout
    store: ObjectStore
    fingerprint: str
    max_steps: int
    device_type: Literal["cpu", "cuda"] = "cpu"

    @property
    def optim(self) -> Optim:
        """The optimizer, which decides the bars."""
        assert self.config.train is not None
        return self.config.train.optim

    @property
    def device(self) -> torch.device:
        """The device of this rank."""
        return torch.device("cpu") if self.device_type == "cpu" else torch.device("cuda", dist.get_rank())


@dataclass(frozen=True, slots=True)
class Reference:
    """What one process gave; the tensors are in a file.

    Attributes:
        names: What is compared, in the order of the model.
        seconds: How long it took.
        dropout: The highest dropout of the model as the file says it, which the check switches off.
    """

    names: Mapping[Quantity, Sequence[str]]
    seconds: float
    dropout: float


def train_reference(assignment: Assignment, path: str) -> Reference:
    """Train in one process and write what it gave.

    Args:
        assignment: What is trained.
        path: A file that is written.

    Raises:
        ConfigError: The model draws random numbers also without dropout.
    """
    started = time.monotonic()
    recorder = Recorder()
    parts = build_parts(assignment, recorder)
    parts = replace(parts, model=build_whole(parts, assignment.device), fill=None)
    check_repeatable(parts)
    trace = run_steps(assignment, parts, recorder)
    write_trace(trace, path)
    return Reference(names_of(trace), time.monotonic() - started, recorder.dropout)


def measure_layout(assignment: Assignment, path: str, fault: Fault | None = None) -> Errors:
    """Train as one rank of a layout, and say how far its values are from those of one process.

    Args:
        assignment: What is trained.
        path: What `train_reference` wrote.
        fault: Makes it wrong.
    """
    recorder = Recorder(fault)
    parts = build_parts(assignment, recorder)
    found = run_steps(assignment, parts if fault is None else fault.parts(parts), recorder)
    return measure(found, read_trace(path), assignment.optim)


def refusals(assignment: Assignment, layouts: Sequence[Layout]) -> dict[Layout, ConfigError]:
    """Return the layouts that the model or the file does not allow, and why; without ranks."""
    config = assignment.config
    _, _, processor = _open(assignment)
    model = skeleton_of(build_unfilled(config, processor)[0])
    found = {}
    for layout in layouts:
        options = ParallelOptions.of(config_in(config, layout))
        try:
            check_layout(model, layout, parallel_plan(model), options)
            check_supported(layout, options, config.train.global_batch_size if config.train else 1)
        except ConfigError as error:
            found[layout] = error
    return found


def build_parts(assignment: Assignment, recorder: Recorder) -> Parts:
    """Make what the loop works on from the prepared rows, without a run to commit to; dropout is off."""
    config, device = assignment.config, assignment.device
    assert config.train is not None
    torch.backends.cudnn.allow_tf32 = False
    task, data, processor = _open(assignment)
    model, fill = build_unfilled(config, processor)
    recorder.dropout = switch_off_dropout(model)
    return Parts(
        model=model if fill is not None else model.to(device),
        task=task,
        processor=processor,
        train=data.split("train"),
        validation=None,
        device=device,
        mesh=build_mesh(assignment.layout, device.type, timeout_s=config.train.ddp_timeout),
        exchange=Exchange(config.train.ddp_timeout),
        files={},
        saver=recorder.saver,
        fill=fill,
        probe=recorder,
    )


def build_whole(parts: Parts, device: torch.device) -> nn.Module:
    """Give the model all of its weights in this process, without a layout."""
    materialize(parts.model, device)
    if parts.fill is not None:
        parts.fill(parts.model)
    return parts.model


def _open(assignment: Assignment) -> tuple[Task, PreparedData, Processor]:
    add_code(assignment.config.code)
    task, data = load_task(assignment.config), PreparedData(assignment.store, assignment.fingerprint)
    return task, data, task.load_processor(data.processor_files)


def run_steps(assignment: Assignment, parts: Parts, recorder: Recorder) -> Trace:
    """Run the training loop to `train.stop_at_step` and return what this rank saw of it."""
    config = assignment.config
    handle = RunHandle(assignment.store, config.name, 0, 0, "verify")  # nothing is committed under it
    spec = WorkerSpec(config, handle, assignment.fingerprint, assignment.layout, assignment.max_steps)
    run_loop(spec, parts, recorder)
    return Trace(recorder.gradients, recorder.norms, recorder.losses, recorder.saver.parameters, recorder.distance)


def check_repeatable(parts: Parts) -> None:
    """Refuse a model whose loss depends on random numbers: no two layouts draw the same.

    Raises:
        ConfigError: It does.
    """
    rows = [parts.train[index] for index in range(min(_PROBED_ROWS, len(parts.train)))]
    batch = move(parts.task.collate(rows, parts.processor), parts.device)
    losses = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        with torch.no_grad():
            losses.append(float(parts.task.loss(parts.model, batch).total))
    if abs(losses[0] - losses[1]) > _SAME_LOSS * abs(losses[0]):
        raise ConfigError(
            f"the model draws random numbers in training: one batch gave the losses {losses[0]:.6g} and "
            f"{losses[1]:.6g}; layouts draw different ones, so that their results cannot be compared",
            "switch dropout off by a setting under model.config",
        )


class Recorder:
    """Notes what a run does: a probe of its gradients, and the control that its loop talks to.

    Args:
        fault: Makes the run wrong before it is looked at.
    """

    def __init__(self, fault: Fault | None = None) -> None:
        self.gradients: dict[str, Tensor] = {}
        self.norms: list[float] = []
        self.losses: list[float] = []
        self.saver = KeepingSaver()
        self.dropout = self.distance = 0.0
        self._fault = fault
        self._module: nn.Module | None = None

    def cut(self, module: nn.Module) -> None:
        """Learn what is trained."""
        self._module = module
        if self._fault is not None:
            self._fault.cut(module)

    @torch.no_grad()
    def backward(self, step: int, scale: float) -> None:
        """Keep the gradients of the first step, whole, as means over the global batch."""
        assert self._module is not None
        parameters = dict(self._module.named_parameters())
        if self._fault is not None:
            self._fault.backward(parameters)
        if step == 1:
            self.gradients = {
                name: whole(parameter.grad) * scale
                for name, parameter in parameters.items()
                if parameter.grad is not None
            }

    def stop_requested(self) -> bool:
        """Nobody stops the run."""
        return False

    def log(self, record: MetricRecord) -> None:
        """Keep loss and norm of a step; told on rank 0."""
        self.losses.append(record.loss)
        self.norms.append(record.grad_norm)
        self.distance += record.learning_rate

    def saved(self, result: SaveResult) -> None:
        """Nothing is committed."""


@dataclass
class KeepingSaver:
    """Keeps the weights that would be committed, whole.

    Attributes:
        parameters: Parameters and buffers after the last step, by name.
    """

    parameters: dict[str, Tensor] = field(default_factory=dict)

    def save(self, *, tensors: Mapping[str, Tensor], **_: Any) -> None:
        """Copy the weights; the optimizer's state shows in them."""
        self.parameters = {
            name.removeprefix(_MODEL_PREFIX): whole(tensor)
            for name, tensor in tensors.items()
            if name.startswith(_MODEL_PREFIX)
        }

    def poll(self) -> list[SaveResult]:
        """Nothing is written."""
        return []

    def wait(self) -> list[SaveResult]:
        """Nothing is written."""
        return []

    def close(self) -> None:
        """There is nothing to give back."""


def write_trace(trace: Trace, path: str) -> None:
    """Write a trace as one safetensors file."""
    tensors = {f"gradients/{name}": value.contiguous() for name, value in trace.gradients.items()}
    tensors |= {f"parameters/{name}": value.contiguous() for name, value in trace.parameters.items()}
    numbers = {"norms": json.dumps(trace.norms), "losses": json.dumps(trace.losses)}
    numbers["distance"] = json.dumps(trace.distance)
    save_file(tensors, path, metadata=numbers)


def read_trace(path: str) -> Trace:
    """Read a trace back."""
    kept: dict[str, dict[str, Tensor]] = {"gradients": {}, "parameters": {}}
    with safe_open(path, "pt") as file:
        for key in file.keys():  # no mapping
            quantity, _, name = key.partition("/")
            kept[quantity][name] = file.get_tensor(key)
        numbers = {key: json.loads(value) for key, value in file.metadata().items()}
    return Trace(kept["gradients"], numbers["norms"], numbers["losses"], kept["parameters"], numbers["distance"])
