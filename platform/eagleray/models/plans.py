"""How each model family can be cut: its layers, and the tensor-parallel style of each module."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from eagleray.models.hf_plans import hf_plan
from eagleray.models.stages import BertParts, DistilBertParts, MarianParts, T5Parts, ViTParts
from eagleray.parallel.plan import ParallelPlan, TensorStyle

_BART_ATTENTION: dict[str, TensorStyle] = {
    "*.layers.*_attn": "region",
    "*.layers.*.[qkv]_proj": "colwise",
    "*.layers.*.out_proj": "rowwise",
    "*.layers.*.fc1": "colwise",
    "*.layers.*.fc2": "rowwise",
    "*.layers.*layer_norm": "norm",
}


def parallel_plan(model: nn.Module) -> ParallelPlan:
    """Return what a model tells about how it can be cut.

    A model's own `parallel_plan()` comes first; then what is known of its family; then the `base_model_tp_plan`
    that a Hugging Face config may carry. A model of no such kind can only be replicated, or sharded as one unit.
    """
    own = getattr(model, "parallel_plan", None)
    if callable(own):
        plan = own()
        assert isinstance(plan, ParallelPlan), f"{type(model).__name__}.parallel_plan() returned {type(plan)}"
        return plan
    # By class: a family's other heads have other names and other things around the layers. FSDP derives its own.
    names = (cls.__name__ for cls in type(model).__mro__)
    build = next((_PLANS[name] for name in names if name in _PLANS), None)
    return hf_plan(model) if build is None else build(model.config)


def _marian(config: Any) -> ParallelPlan:
    return ParallelPlan(
        layers=("model.encoder.layers", "model.decoder.layers"),
        tensor={
            "model.shared": "vocab",
            "model.*.embed_tokens": "vocab",
            **_BART_ATTENTION,
            "lm_head": "vocab_head",
        },
        divisible={
            "encoder_attention_heads": config.encoder_attention_heads,
            "decoder_attention_heads": config.decoder_attention_heads,
            "encoder_ffn_dim": config.encoder_ffn_dim,
            "decoder_ffn_dim": config.decoder_ffn_dim,
        },
        sequence=True,
        pipeline=MarianParts,
    )


def _t5(config: Any) -> ParallelPlan:
    biases = tuple(
        f"{side}.block.0.layer.0.SelfAttention.relative_attention_bias" for side in ("encoder", "decoder")
    )
    return ParallelPlan(
        layers=("encoder.block", "decoder.block"),
        tensor={
            "shared": "vocab",
            "*.embed_tokens": "vocab",
            "*.block.*Attention": "region",
            "*.block.*Attention.[qkv]": "colwise",
            "*.block.*Attention.relative_attention_bias": "colwise",
            "*.block.*Attention.o": "rowwise",
            "*.block.*.wi_[01]" if config.is_gated_act else "*.block.*.wi": "colwise",
            "*.block.*.wo": "rowwise",
            "*.block.*.layer_norm": "norm",
            "lm_head": "vocab_head",
        },
        divisible={"num_heads": config.num_heads, "d_ff": config.d_ff},
        divided={"*.block.*Attention": "n_heads"},
        read_by_layers=biases,
        sequence=True,
        pipeline=T5Parts,
    )


def _bert(config: Any) -> ParallelPlan:
    return ParallelPlan(
        layers=("bert.encoder.layer",),
        tensor={
            "bert.embeddings.word_embeddings": "vocab",
            "*.layer.*.attention.self": "region",
            "*.attention.self.query": "colwise",
            "*.attention.self.key": "colwise",
            "*.attention.self.value": "colwise",
            "*.layer.*.attention.output.dense": "rowwise",
            "*.layer.*.intermediate.dense": "colwise",
            "*.layer.*.output.dense": "rowwise",
            "*.layer.*.LayerNorm": "norm",
        },
        divisible=_encoder_numbers(config),
        sequence=True,
        pipeline=BertParts,
    )


def _distilbert(config: Any) -> ParallelPlan:
    return ParallelPlan(
        layers=("distilbert.transformer.layer",),
        tensor={
            "distilbert.embeddings.word_embeddings": "vocab",
            "*.layer.*.attention": "region",
            "*.layer.*.attention.[qkv]_lin": "colwise",
            "*.layer.*.attention.out_lin": "rowwise",
            "*.layer.*.ffn.lin1": "colwise",
            "*.layer.*.ffn.lin2": "rowwise",
            "*.layer.*_layer_norm": "norm",
        },
        divisible={"n_heads": config.n_heads, "hidden_dim": config.hidden_dim},
        sequence=True,
        pipeline=DistilBertParts,
    )


def _vit(config: Any) -> ParallelPlan:
    return ParallelPlan(
        layers=("vit.layers",),
        tensor={
            "*.layers.*.attention": "region",
            "*.layers.*.attention.[qkv]_proj": "colwise",
            "*.layers.*.attention.o_proj": "rowwise",
            "*.layers.*.mlp.fc1": "colwise",
            "*.layers.*.mlp.fc2": "rowwise",
            "*.layers.*.layernorm_*": "norm",
        },
        divisible=_encoder_numbers(config),
        sequence=True,
        pipeline=ViTParts,
    )


def _encoder_numbers(config: Any) -> dict[str, int]:
    return {"num_attention_heads": config.num_attention_heads, "intermediate_size": config.intermediate_size}


_PLANS: Mapping[str, Callable[[Any], ParallelPlan]] = {
    "MarianMTModel": _marian,
    "T5ForConditionalGeneration": _t5,
    "BertForSequenceClassification": _bert,
    "DistilBertForSequenceClassification": _distilbert,
    "ViTForImageClassification": _vit,
}
