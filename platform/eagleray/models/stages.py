"""What each model family does around its layers, for pipelines; the layers themselves are transformers'."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from eagleray.parallel.plan import PipelineParts

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


class MarianParts(PipelineParts):
    """Encoder and decoder of Marian (and BART's kin with post-norm layers)."""

    embed_modules = (
        ("model.encoder.embed_tokens", "model.encoder.embed_positions"),
        ("model.decoder.embed_tokens", "model.decoder.embed_positions"),
    )
    head_modules = ("lm_head",)

    def __init__(self, model: nn.Module) -> None:
        self._model: Any = model

    def embed(self, part: int, inputs: Mapping[str, Any]) -> Tensor:
        """Embed tokens and positions."""
        side = self._model.model.decoder if part else self._model.model.encoder
        ids = inputs["decoder_input_ids" if part else "input_ids"]
        tokens: Tensor = side.embed_tokens(ids) * side.embed_scale
        return F.dropout(tokens + side.embed_positions(ids.shape), side.dropout, side.training)

    def arguments(self, part: int, hidden: Tensor, memory: Tensor | None, inputs: Mapping[str, Any]) -> Arguments:
        """Return the masks, and in the decoder the encoder's result."""
        from transformers.masking_utils import create_bidirectional_mask, create_causal_mask

        config, mask = self._model.config, inputs["attention_mask"]
        if part == 0:
            own = create_bidirectional_mask(config=config, inputs_embeds=hidden, attention_mask=mask)
            return (own,), {}
        own = create_causal_mask(
            config=config,
            inputs_embeds=hidden,
            attention_mask=hidden.new_ones(hidden.shape[:2]),
            past_key_values=None,
        )
        cross = create_bidirectional_mask(
            config=config, inputs_embeds=hidden, attention_mask=mask, encoder_hidden_states=memory
        )
        return (own, memory), {"encoder_attention_mask": cross, "use_cache": False}

    def head(self, hidden: Tensor, inputs: Mapping[str, Any]) -> Any:
        """Project to the vocabulary."""
        from transformers.modeling_outputs import Seq2SeqLMOutput

        return Seq2SeqLMOutput(logits=self._model.lm_head(hidden) + self._model.final_logits_bias)


class T5Parts(PipelineParts):
    """Encoder and decoder of T5; every stage makes its position biases from its own copy of their table."""

    embed_modules = (("encoder.embed_tokens",), ("encoder.final_layer_norm", "decoder.embed_tokens"))
    head_modules = ("decoder.final_layer_norm", "lm_head")

    def __init__(self, model: nn.Module) -> None:
        self._model: Any = model

    def embed(self, part: int, inputs: Mapping[str, Any]) -> Tensor:
        """Embed tokens; positions come with the biases of the attention."""
        side = self._model.decoder if part else self._model.encoder
        embedded: Tensor = side.dropout(side.embed_tokens(inputs["decoder_input_ids" if part else "input_ids"]))
        return embedded

    def memory(self, hidden: Tensor) -> Tensor:
        """Close the encoder."""
        encoder = self._model.encoder
        closed: Tensor = encoder.dropout(encoder.final_layer_norm(hidden))
        return closed

    def arguments(self, part: int, hidden: Tensor, memory: Tensor | None, inputs: Mapping[str, Any]) -> Arguments:
        """Return the masks and biases, and in the decoder the encoder's result."""
        from transformers.masking_utils import create_bidirectional_mask, create_causal_mask

        side, mask = self._model.decoder if part else self._model.encoder, inputs["attention_mask"]
        keys = {"config": side.config, "inputs_embeds": hidden}
        length = hidden.shape[1]
        attention = side.get_submodule("block.0.layer.0.SelfAttention")
        bias = attention.compute_bias(length, length, device=hidden.device)
        if part == 0:
            return (create_bidirectional_mask(attention_mask=mask, **keys), bias), {}
        own = create_causal_mask(attention_mask=None, past_key_values=None, **keys)
        cross = create_bidirectional_mask(attention_mask=mask, encoder_hidden_states=memory, **keys)
        return (own, bias, memory, cross), {}

    def head(self, hidden: Tensor, inputs: Mapping[str, Any]) -> Any:
        """Close the decoder and project to the vocabulary."""
        from transformers.modeling_outputs import Seq2SeqLMOutput

        model = self._model
        closed = model.decoder.dropout(model.decoder.final_layer_norm(hidden))
        scale = model.model_dim**-0.5 if model.config.scale_decoder_outputs else 1.0
        return Seq2SeqLMOutput(logits=model.lm_head(closed * scale))


class BertParts(PipelineParts):
    """BERT with a classification head."""

    embed_modules = (("bert.embeddings",),)
    head_modules = ("bert.pooler", "classifier")

    def __init__(self, model: nn.Module) -> None:
        self._model: Any = model

    def embed(self, part: int, inputs: Mapping[str, Any]) -> Tensor:
        """Embed tokens, positions and types."""
        result: Tensor = self._model.bert.embeddings(
            input_ids=inputs["input_ids"], token_type_ids=inputs.get("token_type_ids")
        )
        return result

    def arguments(self, part: int, hidden: Tensor, memory: Tensor | None, inputs: Mapping[str, Any]) -> Arguments:
        """Return the mask."""
        from transformers.masking_utils import create_bidirectional_mask

        mask = inputs.get("attention_mask")
        return (
            create_bidirectional_mask(config=self._model.config, inputs_embeds=hidden, attention_mask=mask),
        ), {}

    def head(self, hidden: Tensor, inputs: Mapping[str, Any]) -> Any:
        """Pool and classify."""
        from transformers.modeling_outputs import SequenceClassifierOutput

        pooled = self._model.dropout(self._model.bert.pooler(hidden))
        return SequenceClassifierOutput(logits=self._model.classifier(pooled))


class DistilBertParts(PipelineParts):
    """DistilBERT with a classification head."""

    embed_modules = (("distilbert.embeddings",),)
    head_modules = ("pre_classifier", "classifier")

    def __init__(self, model: nn.Module) -> None:
        self._model: Any = model

    def embed(self, part: int, inputs: Mapping[str, Any]) -> Tensor:
        """Embed tokens and positions."""
        embeddings: Tensor = self._model.distilbert.embeddings(inputs["input_ids"])
        return embeddings

    def arguments(self, part: int, hidden: Tensor, memory: Tensor | None, inputs: Mapping[str, Any]) -> Arguments:
        """Return the mask."""
        from transformers.masking_utils import create_bidirectional_mask

        mask = inputs.get("attention_mask")
        return (
            create_bidirectional_mask(config=self._model.config, inputs_embeds=hidden, attention_mask=mask),
        ), {}

    def head(self, hidden: Tensor, inputs: Mapping[str, Any]) -> Any:
        """Classify by the first token."""
        from transformers.modeling_outputs import SequenceClassifierOutput

        pooled = self._model.dropout(F.relu(self._model.pre_classifier(hidden[:, 0])))
        return SequenceClassifierOutput(logits=self._model.classifier(pooled))


class ViTParts(PipelineParts):
    """ViT with a classification head."""

    embed_modules = (("vit.embeddings",),)
    head_modules = ("vit.layernorm", "classifier")

    def __init__(self, model: nn.Module) -> None:
        self._model: Any = model

    def embed(self, part: int, inputs: Mapping[str, Any]) -> Tensor:
        """Embed patches and positions."""
        embeddings: Tensor = self._model.vit.embeddings(inputs["pixel_values"])
        return embeddings

    def arguments(self, part: int, hidden: Tensor, memory: Tensor | None, inputs: Mapping[str, Any]) -> Arguments:
        """Images have no padding."""
        return (None,), {}

    def head(self, hidden: Tensor, inputs: Mapping[str, Any]) -> Any:
        """Classify by the first patch."""
        from transformers.modeling_outputs import ImageClassifierOutput

        return ImageClassifierOutput(logits=self._model.classifier(self._model.vit.layernorm(hidden)[:, 0]))
