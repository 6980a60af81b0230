"""CTranslate2 behind our interface: greedy decoding of Marian models on CPUs (Klein et al. 2020, WNGT).

Needs the extra `eagleray[ctranslate2]`.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from eagleray.engine.decoder import DecodingSession, NetworkGenerator, UnknownModelError
from eagleray.engine.decoder.families import plain
from eagleray.engine.decoder.rules import DecodingRules
from eagleray.engine.options import DecodingOptions
from eagleray.engine.plan import BatchLimits

ComputeType = Literal["float32", "int8"]
ACTIVATIONS = {"gelu": "GELU", "gelu_new": "GELUTanh", "relu": "RELU", "silu": "SWISH", "swish": "SWISH"}


class CTranslate2Generator:
    """Decodes greedily with CTranslate2, and with another generator what that does otherwise.

    Its beam search keeps other hypotheses than transformers', so beams go to the other generator. Each thread
    decodes rows of its own: two that share the small products of a row mostly wait for each other.

    Args:
        model: A `MarianMTModel`.
        compute_type: Precision of the matrix products.
        limits: Rows at once.
        otherwise: Decodes the rest, and knows the rules.

    Raises:
        UnknownModelError: The model is not one that CTranslate2 is known to compute rightly.
        ImportError: CTranslate2 is not installed.
    """

    def __init__(
        self, model: nn.Module, compute_type: ComputeType, limits: BatchLimits, otherwise: NetworkGenerator
    ) -> None:
        self._num_threads = torch.get_num_threads()
        self._translator = _load(model, compute_type, self._num_threads)
        self._limits, self._otherwise = limits, otherwise

    def generate(self, sources: Sequence[Sequence[int]], options: DecodingOptions) -> list[list[int]]:
        """Return what is generated for each source, in their order."""
        rules = self._otherwise.rules(options)
        if not _is_plain(rules):
            return self._otherwise.generate(sources, options)
        results = self._translator.translate_batch(
            [[str(token) for token in source] for source in sources],
            beam_size=1,
            max_batch_size=min(self._limits.max_items, -(-len(sources) // self._num_threads)),
            max_input_length=0,
            max_decoding_length=rules.max_new_tokens,
            min_decoding_length=rules.min_new_tokens,
            suppress_sequences=[[str(token)] for token in rules.barred] or None,
            return_end_token=True,
        )
        return [[rules.start_token_id, *map(int, result.hypotheses[0])] for result in results]

    is_stepwise = False

    @property
    def start_token_id(self) -> int:
        """What stands in front of every answer."""
        return self._otherwise.start_token_id

    def session(self, options: DecodingOptions) -> DecodingSession:
        """Return a session of the other generator: CTranslate2 tells nothing before the end."""
        return self._otherwise.session(options)


def is_known(model: nn.Module) -> bool:
    """Whether CTranslate2 computes what the model does, given that our own decoder knows every part of it."""
    config: Any = getattr(model, "config", None)
    return type(model).__name__ == "MarianMTModel" and config.activation_function in ACTIVATIONS


def _is_plain(rules: DecodingRules) -> bool:
    """Whether CTranslate2 chooses the same tokens."""
    return (
        rules.num_beams == 1
        and len(rules.eos_token_ids) == 1
        and not rules.barred_first
        and rules.forced_first is None
        and not rules.forced_last
    )


def _load(model: Any, compute_type: ComputeType, num_threads: int) -> Any:
    import ctranslate2

    with tempfile.TemporaryDirectory(prefix="eagleray-ctranslate2-") as folder:
        write_model(model, compute_type, folder)
        translator = ctranslate2.Translator(
            folder, device="cpu", compute_type=compute_type, inter_threads=num_threads, intra_threads=1
        )
    torch.set_num_threads(num_threads)  # CTranslate2 sets OpenMP's threads for this one, which are torch's as well
    return translator


def write_model(model: Any, compute_type: ComputeType, folder: str) -> None:
    """Write a `MarianMTModel` as CTranslate2 reads it; a token is called by its number.

    Raises:
        UnknownModelError: It is another one.
    """
    spec = _specify(model)
    spec.validate()
    spec.optimize(quantization=compute_type)
    spec.save(folder)


def _specify(model: Any) -> Any:
    """Return the model as CTranslate2's own description of weights: nothing is pickled."""
    from ctranslate2.specs import TransformerSpec, common_spec
    from ctranslate2.specs.transformer_spec import TransformerDecoderSpec, TransformerEncoderSpec

    if not is_known(model):
        raise UnknownModelError("it is no MarianMTModel")
    encoder, decoder, config = model.model.encoder, model.model.decoder, model.config
    activation = getattr(common_spec.Activation, ACTIVATIONS[config.activation_function])
    options: Mapping[str, Any] = {"pre_norm": False, "activation": activation}
    spec = TransformerSpec(
        TransformerEncoderSpec(len(encoder.layers), config.encoder_attention_heads, **options),
        TransformerDecoderSpec(len(decoder.layers), config.decoder_attention_heads, **options),
    )
    _fill_stack(spec.encoder, spec.encoder.embeddings[0], encoder)
    _fill_stack(spec.decoder, spec.decoder.embeddings, decoder)
    spec.decoder.projection.weight = _copy(model.lm_head.weight)
    spec.decoder.projection.bias = _copy(model.final_logits_bias)[0]
    words = [str(token) for token in range(config.vocab_size)]  # tokens are written as their numbers
    spec.register_source_vocabulary(words)
    spec.register_target_vocabulary(words[: len(model.lm_head.weight)])
    _name_tokens(spec.config, model.generation_config)
    return spec


def _name_tokens(config: Any, generation: Any) -> None:
    start = generation.decoder_start_token_id
    end = generation.eos_token_id[0] if isinstance(generation.eos_token_id, list) else generation.eos_token_id
    config.bos_token = config.decoder_start_token = str(start)
    config.eos_token, config.unk_token = str(end), str(start)


def _fill_stack(spec: Any, embeddings: Any, stack: Any) -> None:
    spec.scale_embeddings = float(stack.embed_scale)
    spec.position_encodings.encodings = _copy(stack.embed_positions.weight)
    embeddings.weight = _copy(stack.embed_tokens.weight)
    for part, layer in zip(spec.layer, stack.layers, strict=True):
        own = layer.self_attn
        _fill_linear(part.self_attention.linear[0], own.q_proj, own.k_proj, own.v_proj)
        _fill_linear(part.self_attention.linear[1], own.out_proj)
        _fill_norm(part.self_attention.layer_norm, layer.self_attn_layer_norm)
        if hasattr(layer, "encoder_attn"):
            cross = layer.encoder_attn
            _fill_linear(part.attention.linear[0], cross.q_proj)
            _fill_linear(part.attention.linear[1], cross.k_proj, cross.v_proj)
            _fill_linear(part.attention.linear[2], cross.out_proj)
            _fill_norm(part.attention.layer_norm, layer.encoder_attn_layer_norm)
        _fill_linear(part.ffn.linear_0, layer.fc1)
        _fill_linear(part.ffn.linear_1, layer.fc2)
        _fill_norm(part.ffn.layer_norm, layer.final_layer_norm)


def _fill_linear(spec: Any, *modules: Any) -> None:
    spec.weight = torch.cat([_copy(module.weight) for module in modules])
    spec.bias = torch.cat([_copy(module.bias) for module in modules])


def _fill_norm(spec: Any, module: Any) -> None:
    spec.gamma, spec.beta = _copy(module.weight), _copy(module.bias)


def _copy(tensor: Tensor) -> Tensor:
    """Return values that CTranslate2 may change: it quantises in place."""
    return plain(tensor).float().clone()
