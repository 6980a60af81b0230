"""Translation: text to text, by an encoder-decoder model."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from typing import Any, ClassVar, Literal

from torch import nn
from torch.nn import functional as F

from eagleray.config.schema import RunConfig
from eagleray.engine.decoding import DecodingOptions, generate
from eagleray.errors import ConfigError
from eagleray.hub import locate_pretrained, read_model_config
from eagleray.projection import projecting_only
from eagleray.tasks import rows
from eagleray.tasks.base import (
    Answer,
    Batch,
    Encoded,
    Example,
    Features,
    Head,
    Loss,
    Processor,
    Task,
    batching_itself,
)
from eagleray.tasks.scores import sacrebleu_signatures, score_by_kind, score_translations
from eagleray.tasks.sentences import join_pieces, split_text
from eagleray.tasks.tokenizer import load_tokenizer, save_to_files, tokenise, train_seq2seq_tokenizer

_SETTINGS_FILE = "eagleray_processor.json"
UNFINISHED = "\ufffd"
"""How a text ends whose last character has not all its bytes yet."""


@dataclass(frozen=True, slots=True)
class TranslationSettings:
    """What a tokenizer does not know about its model.

    Attributes:
        source_lang: Language of the input.
        target_lang: Language of the output.
        prefix: Text before every input (T5: `translate English to French: `).
        decoder_start_token_id: First input of the decoder; None: the last token of the target (mBART).
    """

    source_lang: str
    target_lang: str
    prefix: str = ""
    decoder_start_token_id: int | None = None


class TranslationProcessor(Processor):
    """A tokenizer of both languages, and how the decoder starts."""

    def __init__(self, tokenizer: Any, settings: TranslationSettings) -> None:
        self.tokenizer = tokenizer
        self.settings = settings
        self.pad_token_id = int(tokenizer.pad_token_id)
        if hasattr(tokenizer, "src_lang"):  # mBART, NLLB, M2M100 write the language into the text
            _check_languages(tokenizer, settings)
            tokenizer.src_lang, tokenizer.tgt_lang = settings.source_lang, settings.target_lang

    def files(self) -> dict[str, bytes]:
        """Return the tokenizer's files and ours."""
        settings = json.dumps(asdict(self.settings), indent=2, sort_keys=True).encode()
        return {**save_to_files(self.tokenizer.save_pretrained), _SETTINGS_FILE: settings}

    @classmethod
    def from_files(cls, files: Mapping[str, bytes]) -> TranslationProcessor:
        """Rebuild the processor from the files of a checkpoint."""
        return cls(load_tokenizer(files), TranslationSettings(**json.loads(files[_SETTINGS_FILE])))

    def source_ids(self, text: str, max_length: int) -> tuple[list[int], bool]:
        """Return the tokens of an input, and whether they were cut to `max_length`."""
        return tokenise(self.tokenizer, self.settings.prefix + text, max_length)

    def target_ids(self, text: str, max_length: int) -> tuple[list[int], bool]:
        """Return the tokens of a target, and whether they were cut to `max_length`."""
        return tokenise(self.tokenizer, text, max_length, target=True)

    def decoder_inputs(self, target: Sequence[int]) -> list[int]:
        """Return the decoder's inputs: the target moved one to the right."""
        start = self.settings.decoder_start_token_id
        return [target[-1] if start is None else start, *target[:-1]]


class TranslationTask(Task):
    """Translate `source` to `target`."""

    route: ClassVar[Literal["translate", "classify", "predict"]] = "translate"
    columns: ClassVar[tuple[str, ...]] = ("source", "target")
    input_columns: ClassVar[tuple[str, ...]] = ("source",)
    head: ClassVar[Head | None] = "seq2seq-lm"
    best_metric: ClassVar[tuple[str, bool]] = ("loss", False)

    def __init__(self, config: RunConfig) -> None:
        super().__init__(config)
        data = config.data
        self.max_source_length, self.max_target_length = data.max_source_length, data.max_target_length
        self.label_smoothing = config.train.label_smoothing_factor if config.train else 0.0

    def build_processor(self, examples: Iterable[Example]) -> TranslationProcessor:
        """Take the pretrained model's tokenizer, or train one from both languages."""
        data, model = self.config.data, self.config.model
        if model.pretrained is not None:
            return pretrained_processor(self.config)
        texts = chain.from_iterable(
            (rows.read_text(example, "source"), rows.read_text(example, "target")) for example in examples
        )
        longest = max(self.max_source_length, self.max_target_length)
        tokenizer = train_seq2seq_tokenizer(texts, model.tokenizer, longest)
        settings = TranslationSettings(
            data.source_lang, data.target_lang, decoder_start_token_id=int(tokenizer.pad_token_id)
        )
        return TranslationProcessor(tokenizer, settings)

    def load_processor(self, files: Mapping[str, bytes]) -> TranslationProcessor:
        """Rebuild the processor from the files of a checkpoint."""
        return TranslationProcessor.from_files(files)

    def encode(self, example: Example, processor: Processor, *, answer: bool = False) -> Encoded:
        """Tokenise both sides; `length` is the longer one.

        Raises:
            DataError: A side is missing, empty or no text.
        """
        assert isinstance(processor, TranslationProcessor)
        source, cut = processor.source_ids(rows.read_text(example, "source"), self.max_source_length)
        if answer:
            return Encoded({"input_ids": source}, len(source), cut)
        target, target_cut = processor.target_ids(rows.read_text(example, "target"), self.max_target_length)
        length = max(len(source), len(target))
        return Encoded({"input_ids": source, "labels": target}, length, cut or target_cut)

    def collate(self, rows_: Sequence[Features], processor: Processor) -> Batch:
        """Pad to the longest source and target, shapes (B, S) and (B, T)."""
        assert isinstance(processor, TranslationProcessor)
        sources = [row["input_ids"] for row in rows_]
        batch = {"input_ids": rows.pad(sources, processor.pad_token_id), "attention_mask": rows.mask(sources)}
        if rows_ and "labels" in rows_[0]:
            targets = [row["labels"] for row in rows_]
            inputs = [processor.decoder_inputs(target) for target in targets]
            batch |= {
                "decoder_input_ids": rows.pad(inputs, processor.pad_token_id),
                "labels": rows.pad(targets, rows.IGNORED),
            }
        return batch

    def loss(self, model: nn.Module, batch: Batch) -> Loss:
        """Sum the cross entropy over target tokens, smoothed as in Szegedy et al. 2016 (arXiv 1512.00567)."""
        labels = batch["labels"].flatten()
        is_label = labels != rows.IGNORED
        with projecting_only(is_label):
            logits = model(
                input_ids=batch["input_ids"],
                attention_mask=batch["attention_mask"],
                decoder_input_ids=batch["decoder_input_ids"],
                use_cache=False,
            ).logits
        if logits.ndim == 2:  # the model has left out the others
            labels = labels[is_label]
        total = F.cross_entropy(
            logits.flatten(0, -2).float(),
            labels,
            ignore_index=rows.IGNORED,
            reduction="sum",
            label_smoothing=self.label_smoothing,
        )
        return Loss(total, is_label.sum())

    @batching_itself
    def predict(
        self, model: nn.Module, batch: Batch, processor: Processor, options: Mapping[str, Any]
    ) -> list[Answer]:
        """Translate a batch; `options`: `num_beams`, `max_new_tokens`."""
        assert isinstance(processor, TranslationProcessor)
        generated = generate(model, batch["input_ids"], batch["attention_mask"], self.decoding(processor, options))
        texts = processor.tokenizer.batch_decode(generated, skip_special_tokens=True)
        return [{"text": text} for text in texts]

    def source_tokens(self, features: Features) -> Sequence[int]:
        """Return the tokens that the model reads."""
        return features["input_ids"]  # type: ignore[no-any-return]

    def decoded(self, tokens: Sequence[int], processor: Processor) -> Answer:
        """Return the text that generated tokens stand for."""
        assert isinstance(processor, TranslationProcessor)
        return {"text": processor.tokenizer.decode(tokens, skip_special_tokens=True)}

    def partly_decoded(self, tokens: Sequence[int], processor: Processor) -> Answer | None:
        """Return the text of an answer's first tokens; None while its last character lacks bytes."""
        answer = self.decoded(tokens, processor)
        return answer if answer["text"] and not answer["text"].endswith(UNFINISHED) else None

    def score(self, answers: Sequence[Answer], examples: Sequence[Example]) -> dict[str, float]:
        """Return exact match, BLEU and chrF, and each of them per kind."""
        references = [rows.read_text(example, "target") for example in examples]
        return score_by_kind(score_translations, answers, examples, answer_key="text", references=references)

    def score_signatures(self) -> dict[str, str]:
        """Return sacrebleu's signatures."""
        return sacrebleu_signatures()

    def max_length(self, processor: Processor) -> int:
        """Return the longest source, in tokens."""
        return self.max_source_length

    def split(self, example: Example, processor: Processor) -> list[Example]:
        """Cut a text at its sentences into texts that fit."""
        assert isinstance(processor, TranslationProcessor)
        text = rows.read_text(example, "source")
        pieces = split_text(text, lambda piece: not processor.source_ids(piece, self.max_source_length)[1])
        return [{**example, "source": piece} for piece in pieces]

    def join(self, example: Example, parts: Sequence[Example], answers: Sequence[Answer]) -> Answer:
        """Join translations with the white space that stood between their sources."""
        texts = [str(answer["text"]) for answer in answers]
        return {"text": join_pieces(str(example["source"]), [str(part["source"]) for part in parts], texts)}

    def decoding(self, processor: Processor, options: Mapping[str, Any]) -> DecodingOptions:
        """Return how a request's options have it decoded."""
        assert isinstance(processor, TranslationProcessor)
        serve = self.config.serve
        longest = serve.max_new_tokens or self.max_target_length
        tokenizer, settings = processor.tokenizer, processor.settings
        first = tokenizer.convert_tokens_to_ids(settings.target_lang) if hasattr(tokenizer, "tgt_lang") else None
        return DecodingOptions(
            num_beams=int(options.get("num_beams") or serve.num_beams),
            max_new_tokens=min(int(options.get("max_new_tokens") or longest), longest),
            forced_bos_token_id=first,
        )


def pretrained_processor(config: RunConfig) -> TranslationProcessor:
    """Open the tokenizer of `model.pretrained` and read from its config how the decoder starts.

    Raises:
        ConfigError: The checkpoint has no start token and is no model that starts with the target's last one.
    """
    from transformers import AutoTokenizer

    directory = locate_pretrained(config.model)
    model = read_model_config(directory)
    tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    start = model.get("decoder_start_token_id")
    if start is None and model.get("model_type") not in ("mbart", "plbart"):
        raise ConfigError(
            f"{directory}: config.json has no decoder_start_token_id; it is no encoder-decoder model?"
        )
    data = config.data
    settings = TranslationSettings(
        data.source_lang, data.target_lang, _task_prefix(model, data.source_lang, data.target_lang), start
    )
    return TranslationProcessor(tokenizer, settings)


def _task_prefix(model: Mapping[str, Any], source: str, target: str) -> str:
    task = (model.get("task_specific_params") or {}).get(f"translation_{source}_to_{target}") or {}
    return str(task.get("prefix", ""))


def _check_languages(tokenizer: Any, settings: TranslationSettings) -> None:
    for key, code in (("source_lang", settings.source_lang), ("target_lang", settings.target_lang)):
        if tokenizer.convert_tokens_to_ids(code) in (None, tokenizer.unk_token_id):
            known = ", ".join(token for token in tokenizer.all_special_tokens if "_" in token)
            raise ConfigError(f"data.{key}: {code!r} is no language of this multilingual model", f"it has {known}")
