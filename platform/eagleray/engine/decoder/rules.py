"""What a checkpoint's generation config asks of decoding. Pure: settings in, rules out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

FOLLOWED = frozenset({
    "bad_words_ids", "begin_suppress_tokens", "bos_token_id", "decoder_start_token_id", "early_stopping",
    "eos_token_id", "forced_bos_token_id", "forced_eos_token_id", "length_penalty", "max_length",
    "max_new_tokens", "min_length", "min_new_tokens", "num_beams", "pad_token_id", "renormalize_logits",
    "suppress_tokens",
})  # fmt: skip
"""Settings that are followed here, or that every call sets itself."""

WITHOUT_EFFECT = frozenset({
    "assistant_confidence_threshold", "assistant_lookbehind", "cache_config", "cache_implementation",
    "compile_config", "disable_compile", "do_sample", "epsilon_cutoff", "eta_cutoff", "is_assistant",
    "max_cache_len", "min_p", "num_assistant_tokens", "num_assistant_tokens_schedule", "return_legacy_cache",
    "target_lookbehind", "temperature", "top_h", "top_k", "top_p", "transformers_version", "typical_p",
    "use_cache", "_from_model_config",
})  # fmt: skip
"""Settings of sampling, of assistants and of transformers' own caches: they do not change what is chosen here."""

OFF: Mapping[str, Any] = {
    "diversity_penalty": 0.0, "encoder_no_repeat_ngram_size": 0, "encoder_repetition_penalty": 1.0,
    "guidance_scale": 1.0, "no_repeat_ngram_size": 0, "num_beam_groups": 1, "num_return_sequences": 1,
    "repetition_penalty": 1.0,
}  # fmt: skip
"""Values with which a setting that is not followed does nothing."""


@dataclass(frozen=True, slots=True)
class DecodingRules:
    """How the tokens of a row are chosen. The age of a row is the number of tokens it has generated.

    Attributes:
        num_beams: Beams; 1 is greedy.
        max_new_tokens: Age at which every row ends.
        min_new_tokens: Age before which no row ends.
        start_token_id: First input of the decoder.
        eos_token_ids: Tokens that end a row.
        barred: Tokens that are never chosen.
        barred_first: Tokens that are not chosen at the age `barred_first_age`.
        barred_first_age: 0, or 1 where the first token is forced.
        forced_first: The only token of age 0; None: free.
        forced_last: The only tokens of the last age; empty: free.
        length_penalty: Exponent of the length by which a hypothesis' score is divided.
        early_stopping: When a beam search ends, in transformers' words.
        renormalize: Whether scores of the tokens that remain are made a distribution again.
    """

    num_beams: int
    max_new_tokens: int
    start_token_id: int
    eos_token_ids: tuple[int, ...] = ()
    min_new_tokens: int = 0
    barred: tuple[int, ...] = ()
    barred_first: tuple[int, ...] = ()
    barred_first_age: int = 0
    forced_first: int | None = None
    forced_last: tuple[int, ...] = ()
    length_penalty: float = 1.0
    early_stopping: bool | Literal["never"] = False
    renormalize: bool = False

    def is_last(self, age: int) -> bool:
        """Whether the token chosen at this age ends the row whatever it is."""
        return age + 1 >= self.max_new_tokens

    def restrict(self, scores_RKV: Tensor, ages: Sequence[int]) -> None:
        """Give every token that must not be chosen now the score minus infinity, in place.

        R: rows, K: beams, V: vocabulary.

        Args:
            scores_RKV: Logits or log-probabilities.
            ages: Age of each row.
        """
        if self.barred:
            scores_RKV[..., list(self.barred)] = float("-inf")
        for row, age in enumerate(ages):
            if self.barred_first and age == self.barred_first_age:
                scores_RKV[row, :, list(self.barred_first)] = float("-inf")
            if age < self.min_new_tokens:
                scores_RKV[row, :, list(self.eos_token_ids)] = float("-inf")
            if age == 0 and self.forced_first is not None:
                _force(scores_RKV[row], (self.forced_first,))
            if self.forced_last and self.is_last(age):
                _force(scores_RKV[row], self.forced_last)


def unfollowed_settings(settings: Mapping[str, Any]) -> list[str]:
    """Return what a generation config sets that this decoder does not do.

    Args:
        settings: `GenerationConfig.to_dict()`.
    """
    found = [
        name
        for name, value in settings.items()
        if name not in FOLLOWED | WITHOUT_EFFECT and value not in (None, False, OFF.get(name))
    ]
    if any(len(words) != 1 for words in settings.get("bad_words_ids") or []):
        found.append("bad_words_ids of several tokens")
    if not isinstance(_start_token(settings), int):
        found.append("decoder_start_token_id")
    return sorted(found)


def read_rules(
    settings: Mapping[str, Any], *, num_beams: int, max_new_tokens: int, forced_first: int | None
) -> DecodingRules:
    """Return the rules of a generation config of which everything is followed.

    Args:
        settings: `GenerationConfig.to_dict()`.
        num_beams: Beams of this call.
        max_new_tokens: Longest answer of this call, in tokens.
        forced_first: First token of this call; None: what the config says.
    """
    eos = _ids(settings.get("eos_token_id"))
    first = settings.get("forced_bos_token_id") if forced_first is None else forced_first
    fewest = settings.get("min_new_tokens")
    penalty = settings.get("length_penalty")
    words = [word for (word,) in settings.get("bad_words_ids") or [] if word not in eos]
    # transformers counts the start token in `min_length`, and lets no setting forbid the end of a row.
    return DecodingRules(
        num_beams=num_beams,
        max_new_tokens=max_new_tokens,
        start_token_id=_start_token(settings),
        eos_token_ids=eos,
        min_new_tokens=max((settings.get("min_length") or 0) - 1, 0) if fewest is None else fewest,
        barred=(*words, *_ids(settings.get("suppress_tokens"))),
        barred_first=_ids(settings.get("begin_suppress_tokens")),
        barred_first_age=0 if first is None else 1,
        forced_first=first,
        forced_last=_ids(settings.get("forced_eos_token_id")),
        length_penalty=1.0 if penalty is None else float(penalty),
        early_stopping=settings.get("early_stopping") or False,
        renormalize=bool(settings.get("renormalize_logits")),
    )


def _force(scores_KV: Tensor, tokens: Sequence[int]) -> None:
    scores_KV.fill_(float("-inf"))
    scores_KV[:, list(tokens)] = 0.0


def _start_token(settings: Mapping[str, Any]) -> Any:
    start = settings.get("decoder_start_token_id")
    return settings.get("bos_token_id") if start is None else start


def _ids(value: int | Sequence[int] | None) -> tuple[int, ...]:
    if value is None:
        return ()
    return (value,) if isinstance(value, int) else tuple(value)
