"""What the text workers share: pretrained models and tokenizers by name, and records as cached tokens."""

from __future__ import annotations

import hashlib
import importlib
import json
import logging
import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from lte_ray.data import read_records
from lte_ray.data.records import CONTINUES, HUB, Record, check_columns, fingerprint
from lte_ray.errors import DataError, WorkerError

log = logging.getLogger("lte_ray")

TEXT_COLUMN = "text"
"""The column of text unless the user names another."""

MANY = 20
"""Records from which on labels that occur only once are suspicious."""

VERSION = 3
"""Of the cached tokens: a change of how records are read needs another."""


def transformers() -> Any:
    """Imports transformers; raises WorkerError if it isn't installed."""
    try:
        module = importlib.import_module("transformers")
    except ImportError as error:
        raise WorkerError(f"This worker needs transformers ({error}): pip install 'lte-ray[hf]'.") from error
    module.utils.logging.disable_progress_bar()  # every process would show one
    return module


def absolute(source: str) -> str:
    """A file's or folder's path in a form that is valid in every folder; a name on the hub, or a URI, stays as it is."""
    if not source or source.startswith(HUB) or "://" in source:
        return source
    path = Path(source).expanduser()
    return str(path.absolute()) if path.exists() or source != str(path) or path.is_absolute() or source[0] == "." else source


def load(kind: str, name: str, flag: str, **settings: Any) -> Any:
    """Calls ``transformers.KIND.from_pretrained(name)``, e.g. for AutoTokenizer.

    Args:
        flag: the setting that has the name, for messages.

    Raises:
        WorkerError: there is no such folder, or the library can't load it.
    """
    library = transformers()
    if (name.startswith(("/", ".", "~"))) and not Path(name).is_dir():
        raise WorkerError(f"{flag} is {name!r}, but there is no such folder. Give a folder or a name on Hugging Face's hub.")
    try:
        return getattr(library, kind).from_pretrained(name, **settings)
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise WorkerError(
            f"{flag} is {name!r}, which {kind} can't load: {type(error).__name__}: {reason} Give a folder that save_pretrained "
            "wrote, or a name on Hugging Face's hub."
        ) from error


class TextWorker:
    """The settings that the text workers share, and what follows from them."""

    model: str
    data: str
    tokenizer: str
    validation: str
    scratch: bool
    held_out: float

    def check_settings(self, *counts: str) -> None:
        """Makes paths valid in every folder, and checks the settings.

        Args:
            counts: names of those that must be at least 1.

        Raises:
            WorkerError: one is out of its range.
        """
        self.model, self.data, self.tokenizer, self.validation = map(
            absolute, (self.model, self.data, self.tokenizer, self.validation)
        )
        if not 0 < self.held_out < 1:
            raise WorkerError(f"--worker.held-out is {self.held_out}, but it must be between 0 and 1.")
        for name in counts:
            if getattr(self, name) < 1:
                flag = f"--worker.{name.replace('_', '-')}"
                raise WorkerError(f"{flag} is {getattr(self, name)}, but it must be at least 1.")

    @property
    def default_lr_factor(self) -> float:
        """Fine-tuning keeps what the model knows only with smaller steps than training from scratch."""
        return 1.0 if self.scratch else 0.1

    def sources(self) -> list[str]:
        """Where the records are: those for training, and those for validation if they are separate."""
        return [self.data, *([self.validation] if self.validation else [])]

    def describe_data(self) -> str:
        """The source of the training records, and a number that changes with any of its files."""
        return f"{self.data}, {fingerprint(self.data)[:12]}"

    def load_tokenizer(self) -> Any:
        return load("AutoTokenizer", self.tokenizer or self.model, "--worker.tokenizer" if self.tokenizer else "--worker.model")

    def save_files(self, folder: Path) -> None:
        """Keeps the tokenizer with the run, so that exports have it."""
        self.load_tokenizer().save_pretrained(str(folder))


def check_positions(config: Any, flag: str, tokens: int) -> None:
    """Raises WorkerError if the model takes fewer tokens than the setting `flag` asks for."""
    positions = getattr(config, "max_position_embeddings", None)
    if positions is not None and tokens > positions:
        raise WorkerError(f"{flag} is {tokens}, but the model has {positions} positions. Lower it.")


def check_vocabulary(model: nn.Module, tokenizer: Any, name: str) -> None:
    """Raises WorkerError if the tokenizer has more tokens than the model has embeddings."""
    rows = model.get_input_embeddings().num_embeddings
    if len(tokenizer) > rows:
        raise WorkerError(
            f"The tokenizer of {name} has {len(tokenizer)} tokens, but the model embeds {rows}. Give the model's own: "
            "--worker.tokenizer."
        )


def cache_key(what: str, tokenizer: Any, sources: Sequence[str], *settings: Any) -> str:
    """Names the cached tokens of these sources: it changes with any file, with the tokenizer, and with the settings."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    words = backend.to_str() if backend is not None else json.dumps(tokenizer.get_vocab(), sort_keys=True)
    parts = (VERSION, [fingerprint(source) for source in sources], words, chat_template(tokenizer), settings)
    return f"{what}-{hashlib.sha256(repr(parts).encode()).hexdigest()[:24]}"


class Encoder:
    """Turns records into tokens, and says which tokens the loss counts.

    A record has "messages" (the tokenizer's chat template is applied), "prompt" and "completion" (the loss counts the
    completion), or a column of text. The tokenizer's end-of-text token follows each, if it has one.

    Args:
        tokenizer: of transformers.
        column: the column of text.
    """

    def __init__(self, tokenizer: Any, column: str) -> None:
        self.tokenizer, self.column = tokenizer, column
        self.start = [token for token in tokenizer("").input_ids if token == tokenizer.bos_token_id]
        self.end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        template = chat_template(tokenizer)
        self.marks_assistant = bool(re.search(r"{%-?\s*generation", template))
        self.has_template, self.has_messages = bool(template), False
        self._within = False

    def encode(self, record: Record, place: str) -> tuple[list[int], list[int]]:
        """The tokens of a record, and 1 for each that the loss counts, else 0.

        Raises:
            DataError: the record has none of these columns, or they have other types.
        """
        named = self.column != TEXT_COLUMN  # a column that the user names wins
        if named and self.column not in record:
            check_columns(record, (self.column,), place)
        if not named and "messages" in record and self.column not in record:
            return self._encode_messages(record["messages"], place)
        if not named and {"prompt", "completion"} <= record.keys():
            prompt = [*self.start, *self._ids(record["prompt"], place)]
            completion = [*self._ids(record["completion"], place), *self.end]
            return prompt + completion, [0] * len(prompt) + [1] * len(completion)
        if self.column not in record:
            raise DataError(
                f"{place}: a record needs the column {self.column} (--worker.column), or messages, or prompt and completion. "
                f"The columns are: {', '.join(map(str, record))}."
            )
        start = [] if self._within else self.start
        self._within = bool(record.get(CONTINUES))
        ids = [*start, *self._ids(record[self.column], place), *([] if self._within else self.end)]
        return ids, [1] * len(ids)

    def _ids(self, text: Any, place: str) -> list[int]:
        if not isinstance(text, str):
            raise DataError(f"{place}: the text must be a string, but it is a {type(text).__name__}.")
        ids: list[int] = self.tokenizer(text, add_special_tokens=False, verbose=False).input_ids
        return ids

    def _encode_messages(self, messages: Any, place: str) -> tuple[list[int], list[int]]:
        if not self.has_template:
            raise DataError(
                f"{place} has messages, but the tokenizer has no chat template. Give one that has it (--worker.tokenizer), or "
                "records with text."
            )
        for turn in messages if isinstance(messages, list) else [None]:
            if not isinstance(turn, dict) or "role" not in turn or not {"content", "tool_calls"} & turn.keys():
                raise DataError(
                    f'{place}: messages must be a list of objects with role and content, such as {{"role": "user", "content": '
                    f'"Hello"}}, but one is {str(messages if turn is None else turn)[:60]!r}. Rename its keys.'
                )
        if not self.has_messages and not self.marks_assistant:
            log.warning(
                "The chat template doesn't mark the assistant's tokens ({%% generation %%}), so the loss counts all tokens."
            )
        self.has_messages = True
        try:
            encoded = self.tokenizer.apply_chat_template(
                messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=self.marks_assistant
            )
        except Exception as error:
            raise DataError(
                f"{place}: the chat template can't be applied to its messages: {type(error).__name__}: {error}"
            ) from error
        ids = list(encoded["input_ids"])
        return ids, list(encoded["assistant_masks"]) if self.marks_assistant else [1] * len(ids)


def chat_template(tokenizer: Any) -> str:
    """The tokenizer's default chat template; empty if it has none."""
    try:
        return str(tokenizer.get_chat_template())
    except ValueError:
        return ""


def hold_out(records: list[tuple[str, Record]], lengths: Sequence[int], wanted: int) -> list[bool]:
    """Chooses the records for validation: in the order of a hash of their content, until they have `wanted` tokens.

    So a record stays where it is when others are added, up to the border. Records that would make it more than twice as many
    tokens are left for training; if there are no others, the shortest is chosen.
    """
    digests = [hashlib.sha256(json.dumps(record, sort_keys=True, default=str).encode()).digest() for _, record in records]
    chosen, count = [False] * len(records), 0
    for index in sorted(range(len(records)), key=lambda index: (digests[index], index)):
        if count >= wanted:
            break
        if count + lengths[index] <= 2 * wanted:
            chosen[index], count = True, count + lengths[index]
    if lengths and not any(chosen):
        chosen[min(range(len(lengths)), key=lambda index: (lengths[index], digests[index]))] = True
    return chosen


def labeled(source: str, text: str, label: str) -> Iterator[tuple[str, str, str]]:
    """Yields the place, the text and the label's name of each record.

    Raises:
        DataError: a column is missing, or the text isn't a string.
    """
    for place, record in read_records(source):
        check_columns(record, (text, label), place)
        if not isinstance(record[text], str):
            raise DataError(f"{place}: the text must be a string, but it is a {type(record[text]).__name__}.")
        yield place, record[text], label_name(record[label], place)


def label_name(value: Any, place: str) -> str:
    """A label's name: text without spaces around it, or a number, where 1.0 is 1, in text (of CSV), too.

    Raises:
        DataError: it is another value, such as None, NaN or a list, or an empty text.
    """
    name = (
        re.sub(r"^(-?\d+)\.0+$", r"\1", value.strip())
        if isinstance(value, str)
        else str(value)
        if isinstance(value, int)
        else ""
    )
    if isinstance(value, float) and math.isfinite(value):
        name = str(int(value)) if value.is_integer() else str(value)
    if not name:
        raise DataError(
            f"{place}: the label must be a text or a number, but it is {str(value)[:40]!r}. Fill it in, or drop it."
        )
    return name


def check_classes(labels: list[str], what: str) -> None:
    """Raises DataError if most labels occur only once: then they are numbers to predict, or free text, and no classes."""
    counts = Counter(labels)
    single = [name for name, count in counts.items() if count == 1]
    if len(labels) >= MANY and len(single) > len(labels) / 2:
        raise DataError(
            f"{what}: {len(single)} of {len(labels)} records have a label that occurs only once, such as {single[0][:40]!r}. "
            "Each would be a class of its own. Group numbers into ranges, or choose another column with --worker.label."
        )
