"""A checkpoint that answers: encode, sort by length, cut into micro-batches, run, restore the order."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from eagleray.config.schema import ServeConfig
from eagleray.engine.continuous import Decodes, ItemSession
from eagleray.engine.decoder.linear import Precision
from eagleray.engine.decoding import Backend, GeneratingModel, load_generator
from eagleray.engine.items import ItemError, Prepared
from eagleray.engine.plan import BatchLimits, cut_batches
from eagleray.engine.precision import lower_precision
from eagleray.engine.work import Entering
from eagleray.errors import ConfigError, DataError, RanksLostError
from eagleray.models import load_weights, restore_model, whole_weights
from eagleray.models.base import OpenedCheckpoint
from eagleray.tasks import Answer, Example, Features, Processor, Task, load_task, move
from eagleray.tasks.base import batches_itself

logger = logging.getLogger(__name__)

GROWING = "eagleray.growing"
"""Key of an option: somebody wishes to see the answer while it grows, from whatever decodes so."""

_SHOWN_CHARACTERS = 300
_BATCHES_PER_CALL = 16
_MAX_PADDING_SHARE = 0.2


@dataclass(frozen=True, slots=True)
class ModelSummary:
    """What an HTTP layer needs to know of a loaded model.

    Attributes:
        ref: Full reference, `en-fr@r2-step-00001200`.
        name: Name of the model.
        version: `r2-step-00001200`.
        task: The task as the file names it.
        route: The route that it answers.
        input_columns: Columns of an item.
        labels: Class names; empty where there are none.
        source_lang: Language of the input of a translation.
        target_lang: Language of its output.
        max_tokens: Longest item that is answered in one part; None: no limit.
    """

    ref: str
    name: str
    version: str
    task: str
    route: Literal["translate", "classify", "predict"]
    input_columns: tuple[str, ...]
    labels: tuple[str, ...]
    source_lang: str | None
    target_lang: str | None
    max_tokens: int | None


class Engine:
    """A model in memory, its task and its processor.

    `prepare` and `run` may be called from two different threads; each of them from one at a time.

    Args:
        model: The model, with its weights.
        task: Its task.
        processor: Its processor.
        ref: Full reference of its version.
        limits: What one micro-batch may hold.
        device: Where it runs.
        dtype: Precision of the matrix products.
        backend: What generates.
        close: Lets go of what the model holds besides memory of this process.

    Raises:
        ConfigError: The device or the model does not do what was asked for.
    """

    def __init__(
        self,
        model: nn.Module,
        task: Task,
        processor: Processor,
        *,
        ref: str,
        limits: BatchLimits,
        device: torch.device | str = "cpu",
        dtype: Precision = "float32",
        backend: Backend = "auto",
        close: Callable[[], None] = lambda: None,
    ) -> None:
        self.device = torch.device(device)
        _check_precision(dtype, self.device)
        cuts_itself = batches_itself(task.predict)
        self.model = model.to(self.device).eval()
        self._answering = _prepare_model(self.model, limits, dtype, backend, alone=not cuts_itself)
        self.task = task
        self.processor = processor
        self.limits = limits
        # Where rows enter while others leave, one call may get more than one batch, and pads nothing.
        cuts_itself = cuts_itself and isinstance(self._answering, GeneratingModel)
        self._decodes_itself = cuts_itself and isinstance(task, Decodes)
        self._call_limits = limits.times(_BATCHES_PER_CALL) if cuts_itself else limits
        self._max_padding_share = 1.0 if cuts_itself else _MAX_PADDING_SHARE
        self.summary = _summarise(task, processor, ref)
        self.close = close

    def answer(
        self, items: Sequence[Example], options: Mapping[str, Any] | None = None
    ) -> list[Answer | ItemError]:
        """Answer items, each for itself, in their order.

        Args:
            items: Rows with the task's input columns.
            options: What a request may set; the task knows its keys.
        """
        prepared = [self.prepare(item) for item in items]
        answers = iter(self.run([item for item in prepared if isinstance(item, Prepared)], options))
        return [item if isinstance(item, ItemError) else next(answers) for item in prepared]

    def prepare(self, item: Example) -> Prepared | ItemError:
        """Encode an item; one that is too long is split where the task can."""
        try:
            encoded = self.task.encode(item, self.processor, answer=True)
            if not encoded.truncated:
                return Prepared(item, (item,), (encoded.features,), (encoded.length,))
            parts = self.task.split(item, self.processor)
            pieces = [self.task.encode(part, self.processor, answer=True) for part in parts]
        except DataError as error:
            return ItemError("invalid_item", error.message, error.hint)
        except Exception as error:
            # A user's task raises what it likes on an item that is not what it expects.
            logger.warning("%s cannot encode an item", self.summary.ref, exc_info=True)
            return _failed("invalid_item", "the task cannot use this item", error)
        if any(piece.truncated for piece in pieces):
            return self._too_long(splitting=len(parts) > 1)
        features, lengths = [piece.features for piece in pieces], [piece.length for piece in pieces]
        return Prepared(item, tuple(parts), tuple(features), tuple(lengths))

    def run(self, items: Sequence[Prepared], options: Mapping[str, Any] | None = None) -> list[Answer | ItemError]:
        """Answer prepared items, in their order."""
        features = [row for item in items for row in item.features]
        lengths = [length for item in items for length in item.lengths]
        answers: list[Answer | ItemError | None] = [None] * len(features)
        for batch in cut_batches(lengths, self._call_limits, max_padding_share=self._max_padding_share):
            found = self._run_rows([features[row] for row in batch], options or {})
            for row, answer in zip(batch, found, strict=True):
                answers[row] = answer
        remaining = iter(answers)
        return [self._join(item, [next(remaining) for _ in item.parts]) for item in items]

    def growing(self, options: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return the options of an item whose answer is to be seen while it grows."""
        decodes_apart = self._decodes_itself and not self._is_stepwise
        return {**options, GROWING: True} if decodes_apart else options

    def stepper(self, options: Mapping[str, Any] | None = None) -> ItemSession | None:
        """Return what decodes items step by step, so that they enter and leave while others are in work.

        Args:
            options: What a request may set; the task knows its keys. And what `growing` has added.

        Returns:
            None where whole batches are answered: classes, other engines, tasks that generate by themselves.
        """
        asked = dict(options or {})
        is_growing = asked.pop(GROWING, False)
        return self._open(asked) if self._is_stepwise or is_growing else None

    @property
    def _is_stepwise(self) -> bool:
        return isinstance(self._answering, GeneratingModel) and self._answering.generator.is_stepwise

    def stream(self, item: Example, options: Mapping[str, Any] | None = None) -> Iterator[Answer | ItemError]:
        """Yield the answer to an item as far as it is known, at last all of it, or its error.

        Args:
            item: A row with the task's input columns.
            options: What a request may set; the task knows its keys.
        """
        prepared = self.prepare(item)
        if isinstance(prepared, ItemError):
            yield prepared
            return
        session = self._open(options or {})
        if session is None:
            yield from self.run([prepared], options)
            return
        partial: list[Answer | ItemError] = []
        session.add(Entering(0, prepared, on_partial=partial.append))
        shown: Answer | ItemError | None = None
        while not session.is_idle:
            ended = session.step()
            for answer in [*partial, *(each.result for each in ended)]:
                if answer is not None and answer != shown:
                    shown = answer
                    yield answer
            partial.clear()

    def _open(self, options: Mapping[str, Any]) -> ItemSession | None:
        if not self._decodes_itself:
            return None
        assert isinstance(self._answering, GeneratingModel) and isinstance(self.task, Decodes)
        generator = self._answering.generator
        decoding = self.task.decoding(self.processor, options)
        return ItemSession(
            lambda: generator.session(decoding),
            self.task,
            self.processor,
            generator.start_token_id,
            self._join,
            lambda items: self.run(items, options),
        )

    def _run_rows(self, rows: Sequence[Features], options: Mapping[str, Any]) -> list[Answer | ItemError]:
        """Answer one micro-batch; when it fails, its halves, so that only the item at fault fails."""
        try:
            batch = move(self.task.collate(rows, self.processor), self.device)
            with torch.inference_mode():
                answers = self.task.predict(self._answering, batch, self.processor, options)
            if len(answers) != len(rows):
                raise ValueError(
                    f"{type(self.task).__name__}.predict gave {len(answers)} answers to {len(rows)} items"
                )
        except RanksLostError:
            raise  # no item is at fault, and smaller batches would fare no better
        except Exception as error:
            if len(rows) == 1:
                logger.exception("%s failed on an item", self.summary.ref)
                return [_failed("model_failed", "the model failed on this item", error)]
            half = len(rows) // 2
            return [*self._run_rows(rows[:half], options), *self._run_rows(rows[half:], options)]
        return list(answers)

    def _join(self, item: Prepared, answers: Sequence[Answer | ItemError | None]) -> Answer | ItemError:
        found: list[Answer] = []
        for answer in answers:
            assert answer is not None, "every part belongs to one micro-batch"
            if isinstance(answer, ItemError):
                return answer
            found.append(answer)
        if len(found) == 1:
            return found[0]
        try:
            return self.task.join(item.example, item.parts[: len(found)], found)
        except Exception as error:
            logger.exception("%s cannot join the parts of an item", self.summary.ref)
            return _failed("model_failed", "the answers to its parts cannot be joined", error)

    def _too_long(self, *, splitting: bool) -> ItemError:
        limit = f"{self.summary.max_tokens} tokens" if self.summary.max_tokens else "model's limit"
        if splitting:
            return ItemError(
                "too_long", f"a sentence is longer than the limit of {limit}", "split it into shorter ones"
            )
        return ItemError("too_long", f"the item is longer than the limit of {limit}", "shorten it")


def load_engine(
    checkpoint: OpenedCheckpoint,
    device: torch.device | str = "cpu",
    limits: BatchLimits | None = None,
    serve: ServeConfig | None = None,
) -> Engine:
    """Load a committed version for inference.

    Args:
        checkpoint: The opened version.
        device: Where the model runs.
        limits: What one micro-batch may hold; default: what `serve` says.
        serve: Precision and backend; default: the section of its file.

    Raises:
        CheckpointDamagedError: Its weights do not fit its model.
        ConfigError: Its task or factory cannot be imported here, it is an adapter whose base is not here, or
            `serve` asks for what cannot be had.
    """
    config, files = checkpoint.config(), checkpoint.files()
    task = load_task(config)
    model = restore_model(config, files)
    load_weights(model, whole_weights(checkpoint))
    serve = serve or config.serve
    return Engine(
        model,
        task,
        task.load_processor(files),
        ref=checkpoint.ref,
        limits=limits or BatchLimits(serve.max_batch_size, serve.max_batch_tokens),
        device=device,
        dtype=serve.dtype,
        backend=serve.engine,
    )


def _prepare_model(
    model: nn.Module, limits: BatchLimits, precision: Precision, backend: Backend, *, alone: bool
) -> nn.Module:
    """Return the model in its precision, together with what generates for it.

    Args:
        model: The model.
        limits: Rows decoded at once.
        precision: Of the matrix products.
        backend: What generates.
        alone: Whether the task may run the model by itself, so that its own weights are needed too.
    """
    generates = hasattr(model, "generate")
    if backend == "ctranslate2" and not generates:
        raise ConfigError("serve.engine ctranslate2 is for models that generate text", "leave serve.engine out")
    generator = load_generator(model, limits, precision, backend) if generates else None
    if generator is None:
        return lower_precision(model, precision)
    if precision != "float32" and not alone:
        model.to("meta")  # the generator has its own
    return GeneratingModel(model, generator).eval()


def _check_precision(precision: Precision, device: torch.device) -> None:
    if precision == "int8" and device.type != "cpu":
        raise ConfigError(f"serve.dtype int8 is for CPUs, not for {device.type}", "set bfloat16 or float16")
    if precision == "float16" and device.type == "cpu":
        raise ConfigError("serve.dtype float16 is for GPUs, not for CPUs", "set bfloat16 or int8")


def _failed(code: Literal["invalid_item", "model_failed"], message: str, error: Exception) -> ItemError:
    """Return a failure by the kind of an exception, whose text may be the item's."""
    return ItemError(code, f"{message} ({type(error).__name__})", detail=str(error)[:_SHOWN_CHARACTERS] or None)


def _summarise(task: Task, processor: Processor, ref: str) -> ModelSummary:
    translating = task.route == "translate"
    name, _, version = ref.partition("@")
    return ModelSummary(
        ref=ref,
        name=name,
        version=version,
        task=task.config.task,
        route=task.route,
        input_columns=tuple(task.input_columns),
        labels=tuple(processor.labels),
        source_lang=task.config.data.source_lang if translating else None,
        target_lang=task.config.data.target_lang if translating else None,
        max_tokens=task.max_length(processor),
    )
