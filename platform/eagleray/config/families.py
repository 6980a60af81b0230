"""A strict config class per model family, with transformers' key names and our own defaults.

transformers accepts and ignores a misspelt key, and importing one of its config classes imports torch; so a file
is checked against these classes instead. What follows from the data (vocabulary, special tokens, labels) is no
key.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal, Self

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt, model_validator

from eagleray.config.schema import ModelConfig, Section

Activation = Literal["gelu", "gelu_new", "relu", "silu", "swish", "tanh"]
Dropout = float


def _dropout(default: float, what: str) -> Any:
    return Field(default, ge=0, lt=1, description=f"Dropout of {what}.")


class FamilyConfig(Section):
    """Configuration of an architecture that is built from scratch."""

    task: ClassVar[str]
    """The built-in task that the family is made for."""


class MarianFamily(FamilyConfig):
    """Encoder-decoder transformer with sinusoidal positions and one shared embedding (Marian NMT)."""

    task: ClassVar[str] = "translation"

    d_model: PositiveInt = Field(256, description="Width of the model; even, for the sinusoidal positions.")
    encoder_layers: PositiveInt = Field(3, description="Layers of the encoder.")
    decoder_layers: PositiveInt = Field(3, description="Layers of the decoder.")
    encoder_attention_heads: PositiveInt = Field(4, description="Attention heads of an encoder layer.")
    decoder_attention_heads: PositiveInt = Field(4, description="Attention heads of a decoder layer.")
    encoder_ffn_dim: PositiveInt = Field(1024, description="Inner width of an encoder layer.")
    decoder_ffn_dim: PositiveInt = Field(1024, description="Inner width of a decoder layer.")
    activation_function: Activation = Field("swish", description="Activation of the feed-forward layers.")
    dropout: Dropout = _dropout(0.1, "embeddings and of every sub-layer's output")
    attention_dropout: Dropout = _dropout(0.0, "attention weights")
    activation_dropout: Dropout = _dropout(0.0, "the feed-forward activations")
    init_std: PositiveFloat = Field(0.02, description="Standard deviation of the initial weights.")
    scale_embedding: bool = Field(True, description="Multiply embeddings by the square root of d_model.")
    max_position_embeddings: PositiveInt = Field(512, description="Longest input and output, in tokens.")

    @model_validator(mode="after")
    def _divisible(self) -> Self:
        if self.d_model % 2:
            raise ValueError(f"d_model must be even, found {self.d_model}")
        _check_heads("d_model", self.d_model, "encoder_attention_heads", self.encoder_attention_heads)
        _check_heads("d_model", self.d_model, "decoder_attention_heads", self.decoder_attention_heads)
        return self


class T5Family(FamilyConfig):
    """Encoder-decoder transformer with relative positions and one shared embedding (T5)."""

    task: ClassVar[str] = "translation"

    d_model: PositiveInt = Field(256, description="Width of the model.")
    d_kv: PositiveInt = Field(64, description="Width of an attention head.")
    d_ff: PositiveInt = Field(1024, description="Inner width of a layer.")
    num_layers: PositiveInt = Field(3, description="Layers of the encoder.")
    num_decoder_layers: PositiveInt | None = Field(None, description="Layers of the decoder; null: num_layers.")
    num_heads: PositiveInt = Field(4, description="Attention heads of a layer.")
    relative_attention_num_buckets: int = Field(
        32, ge=4, description="Rows of the table of relative position biases."
    )
    relative_attention_max_distance: PositiveInt = Field(
        128, description="Distance beyond which tokens share a bias, in tokens."
    )
    dropout_rate: Dropout = _dropout(0.1, "embeddings, attention weights and of every sub-layer's output")
    layer_norm_epsilon: PositiveFloat = Field(1e-6, description="Term of the norms for numerical stability.")
    initializer_factor: PositiveFloat = Field(1.0, description="Factor on the spread of the initial weights.")
    feed_forward_proj: Literal["relu", "gelu", "gelu_new", "silu", "gated-relu", "gated-gelu", "gated-silu"] = (
        Field("relu", description="Activation of the feed-forward layers; gated ones have two inner projections.")
    )

    @model_validator(mode="after")
    def _long_enough(self) -> Self:
        if self.relative_attention_max_distance <= self.relative_attention_num_buckets // 2:
            raise ValueError(
                f"relative_attention_max_distance {self.relative_attention_max_distance} must be above half of "
                f"relative_attention_num_buckets {self.relative_attention_num_buckets}"
            )
        return self


class BertFamily(FamilyConfig):
    """Bidirectional transformer encoder with a classification head (BERT)."""

    task: ClassVar[str] = "text-classification"

    hidden_size: PositiveInt = Field(128, description="Width of the model.")
    num_hidden_layers: PositiveInt = Field(2, description="Layers.")
    num_attention_heads: PositiveInt = Field(4, description="Attention heads of a layer.")
    intermediate_size: PositiveInt = Field(512, description="Inner width of a layer.")
    hidden_act: Activation = Field("gelu", description="Activation of the feed-forward layers.")
    hidden_dropout_prob: Dropout = _dropout(0.1, "embeddings and of every sub-layer's output")
    attention_probs_dropout_prob: Dropout = _dropout(0.1, "attention weights")
    classifier_dropout: Dropout | None = Field(
        None, ge=0, lt=1, description="Dropout before the classifier; null: hidden_dropout_prob."
    )
    initializer_range: PositiveFloat = Field(0.02, description="Standard deviation of the initial weights.")
    layer_norm_eps: PositiveFloat = Field(1e-12, description="Term of the layer norms for numerical stability.")
    max_position_embeddings: PositiveInt = Field(512, description="Longest input, in tokens.")

    @model_validator(mode="after")
    def _divisible(self) -> Self:
        _check_heads("hidden_size", self.hidden_size, "num_attention_heads", self.num_attention_heads)
        return self


class DistilBertFamily(FamilyConfig):
    """BERT without token types and pooler, with a classification head of two layers (DistilBERT)."""

    task: ClassVar[str] = "text-classification"

    dim: PositiveInt = Field(128, description="Width of the model.")
    n_layers: PositiveInt = Field(2, description="Layers.")
    n_heads: PositiveInt = Field(4, description="Attention heads of a layer.")
    hidden_dim: PositiveInt = Field(512, description="Inner width of a layer.")
    activation: Activation = Field("gelu", description="Activation of the feed-forward layers.")
    dropout: Dropout = _dropout(0.1, "embeddings and of the feed-forward layers' output")
    attention_dropout: Dropout = _dropout(0.1, "attention weights")
    seq_classif_dropout: Dropout = _dropout(0.2, "the classification head")
    sinusoidal_pos_embds: bool = Field(False, description="Whether positions start as sines and cosines.")
    initializer_range: PositiveFloat = Field(0.02, description="Standard deviation of the initial weights.")
    max_position_embeddings: PositiveInt = Field(512, description="Longest input, in tokens.")

    @model_validator(mode="after")
    def _divisible(self) -> Self:
        _check_heads("dim", self.dim, "n_heads", self.n_heads)
        return self


class ViTFamily(FamilyConfig):
    """Vision transformer with a classification head (ViT)."""

    task: ClassVar[str] = "image-classification"

    image_size: PositiveInt = Field(224, description="Height and width that images are resized to, in pixels.")
    patch_size: PositiveInt = Field(16, description="Height and width of a patch, in pixels.")
    num_channels: Literal[1, 3] = Field(3, description="3 for colour, 1 for grey.")
    hidden_size: PositiveInt = Field(128, description="Width of the model.")
    num_hidden_layers: PositiveInt = Field(4, description="Layers.")
    num_attention_heads: PositiveInt = Field(4, description="Attention heads of a layer.")
    intermediate_size: PositiveInt = Field(512, description="Inner width of a layer.")
    hidden_act: Activation = Field("gelu", description="Activation of the feed-forward layers.")
    hidden_dropout_prob: Dropout = _dropout(0.0, "embeddings and of every sub-layer's output")
    attention_probs_dropout_prob: Dropout = _dropout(0.0, "attention weights")
    initializer_range: PositiveFloat = Field(0.02, description="Standard deviation of the initial weights.")
    layer_norm_eps: NonNegativeFloat = Field(1e-12, description="Term of the layer norms for numerical stability.")
    qkv_bias: bool = Field(True, description="Whether queries, keys and values have a bias.")

    @model_validator(mode="after")
    def _divisible(self) -> Self:
        _check_heads("hidden_size", self.hidden_size, "num_attention_heads", self.num_attention_heads)
        if self.image_size % self.patch_size:
            raise ValueError(f"image_size {self.image_size} is no multiple of patch_size {self.patch_size}")
        return self


FAMILIES: dict[str, type[FamilyConfig]] = {
    "marian": MarianFamily,
    "t5": T5Family,
    "bert": BertFamily,
    "distilbert": DistilBertFamily,
    "vit": ViTFamily,
}


def parse_family(model: ModelConfig) -> FamilyConfig:
    """Check `model.config` against the class of `model.family`.

    Raises:
        pydantic.ValidationError: A key or a value is wrong.
    """
    assert model.family is not None, "only a family has a checked config"
    return FAMILIES[model.family].model_validate(model.config)


def _check_heads(width_key: str, width: int, heads_key: str, num_heads: int) -> None:
    if width % num_heads:
        raise ValueError(f"{width_key} {width} is no multiple of {heads_key} {num_heads}")
