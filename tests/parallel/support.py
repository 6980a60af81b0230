"""What is supported: family x layout x schedule as data, and as the table of docs/layouts.md.

A new family is one entry of `FAMILIES`; a combination that is refused is one entry of `REFUSED`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from eagleray.config.layout import Layout

SCHEDULES = ("GPipe", "1F1B", "Interleaved1F1B", "InterleavedZeroBubble", "ZBVZeroBubble")
TWO_STAGES = SCHEDULES[2:]
WORLDS = (1, 2, 3, 4, 8)
HEADS = 24  # divided by every tensor-parallel degree of these worlds
GLOBAL_BATCH_SIZE = 48  # makes equal micro-batches for every pipeline of these worlds
LAYERS = (4, 6, 8, 16)


@dataclass(frozen=True)
class Family:
    """One column.

    Attributes:
        task: What it is trained for.
        model: The section `model` of a file, for a number of layers; the tokenizer is added.
        is_encoder_decoder: Whether its layers are two stacks, with one embedding for both.
    """

    task: str
    model: Callable[[int], dict[str, Any]]
    is_encoder_decoder: bool = False


def _marian(layers: int) -> dict[str, Any]:
    sides = {"layers": layers // 2, "attention_heads": HEADS, "ffn_dim": 48}
    config = {f"{side}_{key}": value for side, (key, value) in product(("encoder", "decoder"), sides.items())}
    return {"family": "marian", "config": {"d_model": 48, "max_position_embeddings": 128} | config}


def _t5(layers: int) -> dict[str, Any]:
    config = {"d_model": 16, "d_kv": 2, "d_ff": 48, "num_heads": HEADS, "num_layers": layers // 2}
    return {"family": "t5", "config": config}


def _bert(layers: int) -> dict[str, Any]:
    config = {"hidden_size": 48, "num_attention_heads": HEADS, "intermediate_size": 48}
    return {"family": "bert", "config": config | {"num_hidden_layers": layers, "max_position_embeddings": 128}}


def _distilbert(layers: int) -> dict[str, Any]:
    config = {"dim": 48, "n_heads": HEADS, "hidden_dim": 48, "n_layers": layers, "max_position_embeddings": 128}
    return {"family": "distilbert", "config": config}


def _vit(layers: int) -> dict[str, Any]:
    config = {
        "hidden_size": 48,
        "num_attention_heads": HEADS,
        "intermediate_size": 48,
        "num_hidden_layers": layers,
    }
    return {"family": "vit", "config": config | {"image_size": 8, "patch_size": 4, "num_channels": 1}}


def _own(layers: int) -> dict[str, Any]:
    return {"factory": "own_module:build", "config": {"width": 16, "inner": 48, "depth": layers}}


FAMILIES = {
    "marian": Family("translation", _marian, is_encoder_decoder=True),
    "t5": Family("translation", _t5, is_encoder_decoder=True),
    "bert": Family("text-classification", _bert),
    "distilbert": Family("text-classification", _distilbert),
    "vit": Family("image-classification", _vit),
    "own module": Family("text-classification", _own),
}


@dataclass(frozen=True)
class Cell:
    """One training.

    Attributes:
        family: Key of `FAMILIES`.
        layout: How the work is cut.
        schedule: Of the pipeline; None without one.
    """

    family: str
    layout: Layout
    schedule: str | None

    @property
    def num_layers(self) -> int:
        """Enough for the stages."""
        stages = self.layout.pipeline * (2 if self.schedule in TWO_STAGES else 1)
        return min(layers for layers in LAYERS if layers >= stages)

    def __str__(self) -> str:
        return "-".join(filter(None, (self.family.replace(" ", "_"), str(self.layout), self.schedule)))


@dataclass(frozen=True)
class Refusal:
    """Cells that are not supported.

    Attributes:
        applies: Which.
        message: What the error says.
        reason: What the document says.
    """

    applies: Callable[[Cell], bool]
    message: str
    reason: str


def _splits_backward(cell: Cell) -> bool:
    return cell.schedule is not None and cell.schedule.endswith("ZeroBubble")


def _has_data_ranks(cell: Cell) -> bool:
    return cell.layout.pipeline > 1 and cell.layout.num_data_ranks > 1


REFUSED = (
    Refusal(
        lambda cell: _splits_backward(cell) and FAMILIES[cell.family].is_encoder_decoder,
        "which torch cannot do through an encoder's result that several layers read",
        "torch cannot split the backward pass through an encoder's result that several layers read",
    ),
    Refusal(
        lambda cell: _splits_backward(cell) and _has_data_ranks(cell),
        "FSDP loses gradients when the backward pass is split",
        "FSDP loses gradients when the backward pass is split",
    ),
    Refusal(
        lambda cell: (
            cell.schedule == "Interleaved1F1B"
            and _has_data_ranks(cell)
            and FAMILIES[cell.family].is_encoder_decoder
        ),
        "which is tied, into two stages of rank",
        "the embedding is tied into two stages of one rank, and FSDP owns the memory of each stage",
    ),
)


def refusal_of(cell: Cell) -> Refusal | None:
    """Return why a cell is not supported, None if it is."""
    return next((refusal for refusal in REFUSED if refusal.applies(cell)), None)


def _layouts() -> list[Layout]:
    degrees = range(1, max(WORLDS) + 1)
    found = [Layout(*each) for each in product(degrees, repeat=4)]
    return sorted(
        (layout for layout in found if layout.num_workers in WORLDS),
        key=lambda layout: (layout.pipeline, layout.num_workers, str(layout)),
    )


LAYOUTS = _layouts()
CELLS = [
    Cell(family, layout, schedule)
    for family in FAMILIES
    for layout in LAYOUTS
    for schedule in (SCHEDULES if layout.pipeline > 1 else (None,))
]


def as_markdown() -> str:
    """Return the table: layouts and schedules that go the same way in every family share a row."""
    rows: dict[tuple[tuple[int | None, ...], str], dict[str, list[str]]] = {}
    for layout, schedule in dict.fromkeys((cell.layout, cell.schedule) for cell in CELLS):
        numbers = tuple(_number(Cell(family, layout, schedule)) for family in FAMILIES)
        layouts = rows.setdefault((numbers, schedule or ""), {}).setdefault("layouts", [])
        layouts.append(str(layout))
    merged: dict[tuple[tuple[int | None, ...], str], list[str]] = {}
    for (numbers, schedule), found in rows.items():
        merged.setdefault((numbers, ", ".join(found["layouts"])), []).append(schedule)
    lines = ["| layouts | schedules | " + " | ".join(FAMILIES) + " |", "|---" * (2 + len(FAMILIES)) + "|"]
    for (numbers, layouts), schedules in merged.items():
        cells = ["yes" if number is None else f"no ({number})" for number in numbers]
        lines.append(f"| {layouts} | {', '.join(schedules)} | " + " | ".join(cells) + " |")
    lines += ["", *(f"{number}. {refusal.reason}" for number, refusal in enumerate(REFUSED, 1))]
    trained = count_trained(CELLS)
    lines += ["", f"{len(CELLS)} cells: {trained} are trained, {len(CELLS) - trained} refused with that reason."]
    return "\n".join(lines)


def _number(cell: Cell) -> int | None:
    refusal = refusal_of(cell)
    return None if refusal is None else REFUSED.index(refusal) + 1


def count_trained(cells: Sequence[Cell]) -> int:
    """Return how many cells are supported."""
    return sum(refusal_of(cell) is None for cell in cells)
