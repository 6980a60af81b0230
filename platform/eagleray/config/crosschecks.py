"""Rules between sections: what one of them says must fit what another says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import ValidationError

from eagleray.config.cutting import cutting_problem
from eagleray.config.families import FAMILIES
from eagleray.config.layout import Layout, resolve_layout
from eagleray.config.problems import Problem, explain
from eagleray.config.schema import BUILTIN_TASKS, RunConfig
from eagleray.errors import ConfigError

SOURCE_TASKS = {
    "cldr-en-fr": "translation",
    "cldr-langid": "text-classification",
    "digits": "image-classification",
}


def cross_problems(config: RunConfig) -> list[Problem]:
    """Return what does not fit together in a file whose sections are right, each for itself."""
    rules = (
        _family_fits_task,
        _training_has_data,
        _source_fits_task,
        _adapter_has_base,
        _layout_fits_workers,
        _replica_can_be_cut,
        _can_offload,
        _can_compile,
        _fp16_has_gpus,
    )
    found = [rule(config) for rule in rules]
    return [problem for problem in found if problem is not None]


def path_problems(config: RunConfig) -> list[Problem]:
    """Return what a file names on this machine that is not there: the directories that travel from here."""
    return [
        Problem(("code", i), f"code: {entry} is not a directory")
        for i, entry in enumerate(config.code)
        if not Path(entry).is_dir()
    ]


def family_problems(value: dict[str, Any]) -> list[Problem]:
    """Check `model.config` of a file against the class of its family, before the rest is known to be right."""
    model = value.get("model")
    settings = model.get("config", {}) if isinstance(model, dict) else None
    if not isinstance(model, dict) or not isinstance(settings, dict):
        return []
    family = FAMILIES.get(str(model.get("family")))
    if family is None:
        return []
    try:
        family.model_validate(settings)
    except ValidationError as error:
        return explain(error.errors(), family, settings, at=("model", "config"))
    return []


def layout_of(config: RunConfig) -> Layout:
    """Resolve the layout of a file.

    Raises:
        ConfigError: The degrees do not fit the number of workers.
    """
    num_workers = config.resources.num_workers
    return resolve_layout(config.parallel, None if num_workers == "auto" else num_workers)


def _family_fits_task(config: RunConfig) -> Problem | None:
    family = FAMILIES.get(config.model.family or "")
    if family is None or config.task not in BUILTIN_TASKS or family.task == config.task:
        return None
    message = f"model.family {config.model.family} is made for {family.task}, but task is {config.task}"
    fitting = " or ".join(name for name, other in FAMILIES.items() if other.task == config.task)
    return Problem(("model", "family"), f"{message}; set model.family to {fitting}")


def _training_has_data(config: RunConfig) -> Problem | None:
    if config.train is None or config.data.source is not None or config.data.train is not None:
        return None
    return Problem(("data",), "data: set either source or train (files); found neither")


def _source_fits_task(config: RunConfig) -> Problem | None:
    of_source = SOURCE_TASKS.get(config.data.source or "")
    if of_source is None or config.task not in BUILTIN_TASKS or of_source == config.task:
        return None
    message = f"data.source {config.data.source} holds examples of {of_source}, but task is {config.task}"
    return Problem(("data", "source"), message)


def _replica_can_be_cut(config: RunConfig) -> Problem | None:
    serve = config.serve
    layout = Layout(tensor=serve.tensor_parallel_degree, pipeline=serve.pipeline_parallel_degree)
    if layout.num_workers == 1:
        return None
    if serve.engine == "ctranslate2":
        message = "serve.engine ctranslate2 runs in one process, but the degrees under serve ask for"
        return Problem(("serve", "engine"), f"{message} {layout.num_workers}; set serve.engine: torch")
    return cutting_problem(config, layout, "serve")


def _can_offload(config: RunConfig) -> Problem | None:
    """Offloading is FSDP's, and what gathers whole weights besides needs them on the GPUs."""
    if not config.parallel.cpu_offload:
        return None
    adapter, train = config.model.adapter, config.train
    reasons = {
        "resources.use_gpu is false": config.resources.use_gpu is False,
        "parallel.data_parallel_shard_degree is 1": config.parallel.data_parallel_shard_degree == 1,
        "parallel.pipeline_parallel_degree is above 1": config.parallel.pipeline_parallel_degree != 1,
        "model.adapter.commit is merged": adapter is not None and adapter.commit == "merged",
        "train.fp16 scales the loss": train is not None and train.fp16,
    }
    found = [reason for reason, applies in reasons.items() if applies]
    if not found:
        return None
    message = f"parallel.cpu_offload does not work where {found[0]}; leave it out"
    return Problem(("parallel", "cpu_offload"), message)


def _can_compile(config: RunConfig) -> Problem | None:
    if config.train is None or not config.train.torch_compile:
        return None
    if config.parallel.pipeline_parallel_degree == 1:
        return None
    message = "train.torch_compile does not work where parallel.pipeline_parallel_degree is above 1; leave it out"
    return Problem(("train", "torch_compile"), message)


def _fp16_has_gpus(config: RunConfig) -> Problem | None:
    if config.train is None or not config.train.fp16 or config.resources.use_gpu is not False:
        return None
    message = "train.fp16 needs GPUs, but resources.use_gpu is false; set train.bf16 instead"
    return Problem(("train", "fp16"), message)


def _adapter_has_base(config: RunConfig) -> Problem | None:
    adapter, train = config.model.adapter, config.train
    if adapter is None or adapter.commit == "merged":
        return None
    if config.model.pretrained is not None and (train is None or train.init_from is None):
        return None
    found = "train.init_from" if train is not None and train.init_from is not None else "the seed"
    message = (
        "model.adapter.commit is adapter, which needs a base that model.pretrained finds again; here it comes "
        f"from {found}; set model.adapter.commit to merged"
    )
    return Problem(("model", "adapter", "commit"), message)


def _layout_fits_workers(config: RunConfig) -> Problem | None:
    try:
        layout = layout_of(config)
    except ConfigError as error:
        return Problem(("parallel",), str(error))
    return cutting_problem(config, layout)
