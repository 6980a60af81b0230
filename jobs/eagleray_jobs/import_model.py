"""`models import`: a Hugging Face directory as a version that can be served without training."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from eagleray.config.layout import Layout
from eagleray.config.schema import RunConfig
from eagleray.errors import ConfigError, StoreError, UsageError
from eagleray.hub import check_directory, read_model_config
from eagleray.models import model_files, open_pretrained
from eagleray.store.claim import RunClaim, claim_run
from eagleray.store.decide import Outcome
from eagleray.store.objects import ObjectStore
from eagleray.store.saver import CheckpointSaver
from eagleray.store.uri import validate_name
from eagleray.tasks import Processor, load_task
from eagleray.tasks.classification import model_labels

_LONGEST = 512
"""Tokens that an input may have where the model names no limit."""
UNDETERMINED = "und"
"""The language code of BCP 47 for one that nobody named."""


def import_model(
    store: ObjectStore,
    directory: str | Path,
    name: str,
    task: str | None = None,
    *,
    source_lang: str | None = None,
    target_lang: str | None = None,
    notify: Callable[[str], None] = lambda text: None,
) -> str:
    """Commit a Hugging Face directory as the first version of a new run.

    Args:
        store: Where to.
        directory: Config, safetensors and tokenizer or image processor, as `save_pretrained` writes them.
        name: Name of the model.
        task: What it is for; None: what its config says.
        source_lang: Language of the input of a translation; None: what an exported directory says.
        target_lang: Language of its output.
        notify: Told what the user should know.

    Returns:
        The full reference of the version.

    Raises:
        ConfigError: The directory cannot be opened safely, or lacks weights of its model.
        UsageError: The name is none, or its task cannot be told.
    """
    root = Path(directory).expanduser().absolute()
    validate_name(name)
    if not root.is_dir():
        raise UsageError(f"{root} is not a directory", "name a directory that save_pretrained wrote")
    check_directory(root)
    config = _describe(root, name, task or find_task(root), source_lang, target_lang)
    processor = _processor(config, root)
    model, new = open_pretrained(config, processor)
    if new:
        raise ConfigError(f"{root} lacks the weights {', '.join(sorted(new))}", "train it first: model.pretrained")
    tensors = {f"model.{key}": value for key, value in _stored(model).items()}
    return _commit(store, config, tensors, model_files(model, config, processor), notify)


def find_task(directory: Path) -> str:
    """Tell the task of a checkpoint from the class in its `config.json`.

    Raises:
        UsageError: It is none that the built-in tasks work with.
    """
    from transformers.models.auto import modeling_auto

    classes = read_model_config(directory).get("architectures") or []
    heads = {
        "translation": modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
        "text-classification": modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
        "image-classification": modeling_auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
    }
    for task, mapping in heads.items():
        if any(found == name or found in name for name in mapping.values() for found in classes):
            return task
    raise UsageError(
        f"{directory}: config.json names {', '.join(classes) or 'no class'}, which is no model of a built-in task",
        f"say which one it is for: {', '.join(heads)}",
    )


def _describe(root: Path, name: str, task: str, source_lang: str | None, target_lang: str | None) -> RunConfig:
    """Write the file that the version is served by."""
    config = read_model_config(root)
    longest = _longest(root, config)
    generation = _read_json(root / "generation_config.json")
    data: dict[str, Any] = {
        "max_source_length": longest,
        "max_target_length": generation.get("max_new_tokens") or generation.get("max_length") or longest,
    }
    if task == "translation":
        ours = _own_settings(root)
        data["source_lang"] = source_lang or ours.get("source_lang") or UNDETERMINED
        data["target_lang"] = target_lang or ours.get("target_lang") or UNDETERMINED
    elif len(labels := model_labels(root)) >= 2:
        data["labels"] = list(labels)
    else:
        raise ConfigError(
            f"{root}: config.json names {len(labels)} class(es) in id2label; a classifier has two or more"
        )
    return RunConfig.model_validate({"name": name, "task": task, "model": {"pretrained": str(root)}, "data": data})


def _longest(root: Path, config: Mapping[str, Any]) -> int:
    """Return the longest input, in tokens: the smallest limit that the model or its tokenizer names."""
    tokenizer = _read_json(root / "tokenizer_config.json")
    limits = [config.get(key) for key in ("max_position_embeddings", "n_positions")]
    # A tokenizer without a limit names 10^30.
    known = [int(limit) for limit in (*limits, tokenizer.get("model_max_length")) if limit and limit < 10**9]
    return min(known, default=_LONGEST)


def _own_settings(root: Path) -> Mapping[str, Any]:
    """Return what an exported version says of itself; nothing for any other directory."""
    return _read_json(root / "eagleray_processor.json")


def _read_json(path: Path) -> Mapping[str, Any]:
    """Return a JSON object of the directory; an empty one where there is no such file."""
    value: Mapping[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return value


def _processor(config: RunConfig, root: Path) -> Processor:
    task = load_task(config)
    if _own_settings(root):
        return task.load_processor({path.name: path.read_bytes() for path in root.glob("*.json")})
    return task.build_processor(iter(()))


def _stored(model: Any) -> dict[str, Any]:
    """Return what a checkpoint holds of a model: each parameter once, and the buffers that are not derived."""
    kept = model.state_dict().keys()
    named = [*model.named_parameters(), *model.named_buffers()]
    return {name: tensor.detach() for name, tensor in named if name in kept}


def _commit(
    store: ObjectStore,
    config: RunConfig,
    tensors: Mapping[str, Any],
    files: Mapping[str, bytes],
    notify: Callable[[str], None],
) -> str:
    claim = claim_run(store, config, new_run=True, notify=notify)
    assert isinstance(claim, RunClaim), "a new run is never finished before it begins"
    with claim:
        saver = CheckpointSaver(None, claim.handle, layout=Layout(), config=config)
        try:
            saver.save(step=0, tensors=tensors, files=files, state={"step": 0}, metrics={})
            (result,) = saver.wait()
        finally:
            saver.close()
        if result.ref is None:
            raise StoreError(f"{config.name} was not committed: {result.error}", "mend the store and import again")
        claim.finish(Outcome.FINISHED, {"imported_from": config.model.pretrained, "ref": result.ref})
    return result.ref
