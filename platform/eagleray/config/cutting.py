"""Whether a layout can cut a model whose sizes are known before anything is built: families, checkpoints here."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from eagleray.config.families import parse_family
from eagleray.config.layout import Layout
from eagleray.config.problems import Problem
from eagleray.config.schema import RunConfig


@dataclass(frozen=True, slots=True)
class Sizes:
    """Keys of a family's config that a layout must fit.

    Attributes:
        heads: What the tensor-parallel degree must divide.
        layers: What pipeline stages are made of; an encoder and a decoder count together.
    """

    heads: tuple[str, ...]
    layers: tuple[str, ...]


SIZES: Mapping[str, Sizes] = {
    "marian": Sizes(
        ("encoder_attention_heads", "decoder_attention_heads", "encoder_ffn_dim", "decoder_ffn_dim"),
        ("encoder_layers", "decoder_layers"),
    ),
    "t5": Sizes(("num_heads", "d_ff"), ("num_layers", "num_decoder_layers")),
    "bert": Sizes(("num_attention_heads", "intermediate_size"), ("num_hidden_layers",)),
    "distilbert": Sizes(("n_heads", "hidden_dim"), ("n_layers",)),
    "vit": Sizes(("num_attention_heads", "intermediate_size"), ("num_hidden_layers",)),
}

_OTHER_HEADS = ("num_attention_heads", "num_key_value_heads", "intermediate_size")
"""What a `base_model_tp_plan` cuts, in models of no family here."""

_STAGES_PER_RANK = {"Interleaved1F1B": 2, "InterleavedZeroBubble": 2, "ZBVZeroBubble": 2}


def cutting_problem(
    config: RunConfig, layout: Layout, section: Literal["parallel", "serve"] = "parallel"
) -> Problem | None:
    """Return why a layout cannot cut a file's model, with the numbers; None where it can, or nobody knows yet.

    Args:
        config: The file.
        layout: The degrees.
        section: Where the file says them.
    """
    if layout.tensor == layout.pipeline == 1:
        return None
    schedule = config.parallel.pipeline_parallel_schedule
    splits_backward = section == "parallel" and layout.pipeline > 1 and schedule.endswith("ZeroBubble")
    if splits_backward and layout.num_data_ranks > 1:
        return _no_schedule(f"{schedule} does not work beside data-parallel degrees: FSDP loses gradients")
    uneven = _uneven_micro_batches(config, layout) if section == "parallel" else None
    if uneven is not None:
        return uneven
    known = _settings(config)
    if known is None:
        return None
    family, values = known
    sizes = SIZES.get(family, Sizes(_OTHER_HEADS, ()))
    numbers = {key: values[key] for key in sizes.heads if isinstance(values.get(key), int)}
    odd = {key: number for key, number in numbers.items() if number % layout.tensor}
    if odd:
        shown = " and ".join(f"{key} {value}" for key, value in odd.items())
        key = (section, "tensor_parallel_degree")
        return Problem(key, f"{'.'.join(key)} {layout.tensor} does not divide {shown} of the {family} model")
    if family not in SIZES and layout.pipeline > 1:
        key = (section, "pipeline_parallel_degree")
        of = ", ".join(SIZES)
        return Problem(key, f"{'.'.join(key)} is {layout.pipeline}, but stages are made of {of}, not of {family}")
    layers = [values.get(key) for key in sizes.layers]
    if section == "serve":
        return _too_many_ranks(layout, layers)
    if splits_backward and len(sizes.layers) > 1:
        reading = "gradients are lost of an encoder's result that several layers read"
        return _no_schedule(f"{schedule} cannot run a {family} model: {reading}")
    return _stages_problem(config, layout, layers)


def uneven_micro_batches(global_batch_size: int, layout: Layout, num_microbatches: int) -> tuple[str, str] | None:
    """Return message and hint where a pipeline cannot cut a global batch into equal micro-batches."""
    parts = layout.num_data_ranks * num_microbatches
    if layout.pipeline == 1 or global_batch_size % parts == 0:
        return None
    return (
        f"train.global_batch_size {global_batch_size} over {layout.num_data_ranks} data-parallel ranks does "
        f"not make {num_microbatches} equal micro-batches for the pipeline",
        f"use a multiple of {parts}, or change parallel.num_microbatches",
    )


def micro_batches(layout: Layout, num_microbatches: int | None) -> int:
    """Return the parts in which a data-parallel rank's rows go through the pipeline."""
    return num_microbatches or 2 * layout.pipeline


def _uneven_micro_batches(config: RunConfig, layout: Layout) -> Problem | None:
    if config.train is None:
        return None
    number = micro_batches(layout, config.parallel.num_microbatches)
    found = uneven_micro_batches(config.train.global_batch_size, layout, number)
    return Problem(("train", "global_batch_size"), "; ".join(found)) if found else None


def _too_many_ranks(layout: Layout, layers: list[Any]) -> Problem | None:
    if not all(isinstance(number, int) for number in layers) or layout.pipeline <= sum(layers):
        return None
    return Problem(
        ("serve", "pipeline_parallel_degree"),
        f"serve.pipeline_parallel_degree {layout.pipeline} makes as many stages, but the model has {sum(layers)} "
        "layers, and each stage needs one",
    )


def _no_schedule(why: str) -> Problem:
    key = ("parallel", "pipeline_parallel_schedule")
    return Problem(
        key, f"{'.'.join(key)} {why} when the backward pass is split; use 1F1B, Interleaved1F1B or GPipe"
    )


def _stages_problem(config: RunConfig, layout: Layout, layers: list[Any]) -> Problem | None:
    parallel = config.parallel
    schedule, split = parallel.pipeline_parallel_schedule, parallel.pipeline_parallel_split
    per_rank = _STAGES_PER_RANK.get(schedule, 1)
    if layout.pipeline == 1 or not all(isinstance(number, int) for number in layers):
        return None
    num_stages, num_layers = layout.pipeline * per_rank, sum(layers)
    if num_stages > num_layers:
        return Problem(
            ("parallel", "pipeline_parallel_degree"),
            f"parallel.pipeline_parallel_degree {layout.pipeline} with {per_rank} stages per rank ({schedule}) "
            f"makes {num_stages} stages, but the model has {num_layers} layers, and each stage needs one",
        )
    if split is None or (len(split) == num_stages and sum(split) == num_layers):
        return None
    key = ("parallel", "pipeline_parallel_split")
    wanted = f"{num_stages} numbers, one for each stage, whose sum is the {num_layers} layers"
    return Problem(key, f"{'.'.join(key)} is {list(split)}; give {wanted}")


def _settings(config: RunConfig) -> tuple[str, Mapping[str, Any]] | None:
    """Return the family and its settings, from the file or from the `config.json` of a local checkpoint."""
    if config.model.family is not None:
        values = parse_family(config.model).model_dump()
        return config.model.family, values | _symmetric(values)
    if config.model.pretrained is None:
        return None
    path = _find_config(config.model.pretrained, config.model.revision)
    try:
        found = json.loads(path.read_text(encoding="utf-8")) if path is not None else None
    except (OSError, ValueError):
        return None  # a directory that is refused where it is opened
    if not isinstance(found, dict) or not isinstance(found.get("model_type"), str):
        return None
    values = {**found, **config.model.config}
    return found["model_type"], values | _symmetric(values)


def _find_config(pretrained: str, revision: str | None) -> Path | None:
    """Return the `config.json` of a directory, or of a hub id that was fetched before; nothing is fetched."""
    directory = Path(pretrained).expanduser()
    if directory.is_dir():
        return directory / "config.json"
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(pretrained, "config.json", revision=revision)
    except HFValidationError:
        return None  # neither a directory nor a hub id: refused where it is opened
    return Path(found) if isinstance(found, str) else None


def _symmetric(values: Mapping[str, Any]) -> dict[str, Any]:
    """T5's decoder is as deep as its encoder unless it is said."""
    return {"num_decoder_layers": values.get("num_decoder_layers") or values.get("num_layers")}
