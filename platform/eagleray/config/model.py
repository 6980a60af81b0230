"""The section `model`: what is trained."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from eagleray.config.section import IMPORT_PATH_PATTERN, Section


class TokenizerConfig(Section):
    """How text becomes tokens."""

    type: Literal["bpe"] = Field("bpe", description="Kind of tokenizer that is trained from the training rows.")
    vocab_size: int = Field(
        2000, ge=261, le=1_000_000, description="Number of tokens; 256 bytes and up to 5 special ones among them."
    )
    lowercase: bool = Field(False, description="Whether the text is lower-cased before it is tokenised.")


class AdapterConfig(Section):
    """Low-rank adaptation (Hu et al. 2021, LoRA, arXiv 2106.09685): W x + alpha / rank * B A x."""

    type: Literal["lora"] = Field("lora", description="Kind of adapter.")
    rank: PositiveInt = Field(8, description="Rows of A and columns of B.")
    alpha: PositiveFloat = Field(16.0, description="Strength; what the adapter adds is scaled by alpha / rank.")
    dropout: float = Field(0.0, ge=0, lt=1, description="Dropout of what the adapter reads.")
    target_modules: list[str] = Field(
        min_length=1,
        description="Linear modules that are adapted: their names, the ends of them, or shell patterns of either.",
    )
    modules_to_save: list[str] = Field(
        default_factory=list,
        description="Modules that are trained whole beside the adapter, for example a new classification head.",
    )
    commit: Literal["adapter", "merged"] = Field(
        "merged",
        description="What a checkpoint holds: the adapter alone, which needs its base wherever it is opened, or "
        "the whole weights with the adapter added to them.",
    )

    @property
    def scale(self) -> float:
        """What the product of the two matrices is multiplied by."""
        return self.alpha / self.rank


class ModelConfig(Section):
    """The model: one of `family`, `pretrained` and `factory`."""

    family: Literal["marian", "t5", "bert", "distilbert", "vit"] | None = Field(
        None, description="Architecture that is built from scratch."
    )
    pretrained: str | None = Field(
        None,
        min_length=1,
        description="Hugging Face checkpoint to start from: a directory or a hub id; safetensors only.",
    )
    revision: str | None = Field(None, description="Commit, tag or branch of a hub checkpoint.")
    factory: str | None = Field(
        None,
        pattern=f"^{IMPORT_PATH_PATTERN}$",
        description="Import path `package.module:build` of a function that returns your torch.nn.Module.",
    )
    config: dict[str, Any] = Field(
        default_factory=dict,
        description="Configuration of the family (its keys are checked), or arguments of the factory.",
    )
    tokenizer: TokenizerConfig = Field(default_factory=TokenizerConfig, description="How text becomes tokens.")
    freeze: list[str] = Field(
        default_factory=list,
        description="Shell patterns of parameter names that are not trained, for example `model.encoder.*`.",
    )

    adapter: AdapterConfig | None = Field(
        None, description="Train a few low-rank matrices beside the weights, which stay as they are."
    )

    @model_validator(mode="after")
    def _one_origin(self) -> Self:
        given = [key for key in ("family", "pretrained", "factory") if getattr(self, key) is not None]
        if len(given) != 1:
            found = " and ".join(given) if given else "none of them"
            raise ValueError(f"set exactly one of family, pretrained and factory; found {found}")
        if self.revision is not None and self.pretrained is None:
            raise ValueError("revision belongs to pretrained")
        return self
