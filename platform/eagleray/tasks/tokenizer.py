"""Training a tokenizer from the data, and moving Hugging Face's pieces between memory and files."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from eagleray.config.schema import TokenizerConfig
from eagleray.errors import ConfigError

PAD, EOS, UNK = "<pad>", "</s>", "<unk>"
CLS, SEP, MASK = "[CLS]", "[SEP]", "[MASK]"
_SEQ2SEQ_TOKENS = {"pad_token": PAD, "eos_token": EOS, "unk_token": UNK}
_CLASSIFIER_TOKENS = {"pad_token": PAD, "unk_token": UNK, "cls_token": CLS, "sep_token": SEP, "mask_token": MASK}
_NUM_BYTES = 256


def train_seq2seq_tokenizer(texts: Iterable[str], config: TokenizerConfig, max_length: int) -> Any:
    """Train a tokenizer that ends a text with `</s>`, for encoder-decoder models."""
    return _train(texts, config, _SEQ2SEQ_TOKENS, f"$A {EOS}", max_length)


def train_classifier_tokenizer(texts: Iterable[str], config: TokenizerConfig, max_length: int) -> Any:
    """Train a tokenizer that puts a text between `[CLS]` and `[SEP]`, for encoders."""
    return _train(texts, config, _CLASSIFIER_TOKENS, f"{CLS} $A {SEP}", max_length)


def _train(
    texts: Iterable[str], config: TokenizerConfig, tokens: Mapping[str, str], template: str, max_length: int
) -> Any:
    """Train byte-level BPE (Sennrich et al. 2016, arXiv 1508.07909; bytes as in Radford et al. 2019).

    Every text can be written in its tokens, so that none is unknown, and decoding gives the text back, white
    space included. Digits stand alone: a number is read digit by digit and not by what the data happened to hold.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    smallest = _NUM_BYTES + len(tokens)
    if config.vocab_size < smallest:
        raise ConfigError(
            f"model.tokenizer.vocab_size is {config.vocab_size}; {_NUM_BYTES} bytes and {len(tokens)} special "
            f"tokens need at least {smallest}"
        )
    tokenizer = Tokenizer(models.BPE())
    steps = [normalizers.NFC(), *([normalizers.Lowercase()] if config.lowercase else [])]
    tokenizer.normalizer = normalizers.Sequence(steps)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=config.vocab_size,
        special_tokens=list(tokens.values()),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    numbers = [(token, tokenizer.token_to_id(token)) for token in tokens.values() if token in template]
    tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=numbers)
    # Without the flag decoding removes the space before punctuation, and French has one there.
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_max_length=max_length, clean_up_tokenization_spaces=False, **tokens
    )


def tokenise(tokenizer: Any, text: str, max_length: int, *, target: bool = False) -> tuple[list[int], bool]:
    """Return the tokens of a text, cut to `max_length` with the closing tokens kept, and whether it was cut.

    The tokenizer's own truncation would change its state, and another thread may be decoding with it.
    """
    given = {"text_target": text} if target else {"text": text}
    encoding = tokenizer(**given, return_special_tokens_mask=True, verbose=False)
    ids, special = list(encoding["input_ids"]), list(encoding["special_tokens_mask"])
    if len(ids) <= max_length:
        return ids, False
    num_closing = next((i for i, flag in enumerate(reversed(special)) if not flag), 0)
    return ids[: max_length - num_closing] + ids[len(ids) - num_closing :], True


def save_to_files(save: Callable[[str], Any]) -> dict[str, bytes]:
    """Return what one of Hugging Face's `save_pretrained` methods writes, by file name."""
    with TemporaryDirectory(prefix="eagleray-") as directory:
        save(directory)
        paths = sorted(path for path in Path(directory).iterdir() if path.is_file())
        return {path.name: path.read_bytes() for path in paths}


@contextmanager
def as_directory(files: Mapping[str, bytes]) -> Iterator[str]:
    """Write files to a temporary directory for one of Hugging Face's `from_pretrained` methods."""
    with TemporaryDirectory(prefix="eagleray-") as directory:
        root = Path(directory).resolve()
        for name, data in files.items():
            path = (root / name).resolve()
            if not path.is_relative_to(root):
                raise ValueError(f"file name {name!r} points out of its directory")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        yield directory


def load_tokenizer(files: Mapping[str, bytes]) -> Any:
    """Open a tokenizer from the files of a checkpoint."""
    from transformers import AutoTokenizer

    with as_directory(files) as directory:
        return AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
