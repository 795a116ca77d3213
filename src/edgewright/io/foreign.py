"""The boundary to other libraries that read files from outside: their exceptions become ours here and nowhere else.

What such a file makes transformers, tokenizers or huggingface_hub raise is of any type: KeyError, AttributeError, plain
Exception, StrictDataclassError, and tokenizers' PanicException, which is no Exception at all. `reading` stands around
calls of theirs alone, so that faults of our own keep their traceback.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgewright.errors import EdgewrightError, FormatError, MissingPackage, in_one_line
from edgewright.io.json_file import LARGEST, read_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Above every published tokenizer: the largest are of about 40 MB, with 262,000 entries and 580,000 merges.
LARGEST_TOKENIZER = 96 << 20  # bytes
MOST_ENTRIES = 4 << 20  # of a vocabulary, of its merges, of the tokens added to it
LONGEST_PADDING = 1 << 20  # tokens to which a tokenizer may fill every text


@contextmanager
def reading(path: str | Path) -> Iterator[None]:
    """Exceptions of another library over a file from outside, as one FormatError with the library's whole message.

    Args:
        path: the file or folder, as it is named in the message.

    Raises:
        MissingPackage: the library needs a package that is not installed.
        FormatError: anything else. Our own errors and Ctrl-C pass as they are.
    """
    try:
        yield
    except EdgewrightError:
        raise
    except ImportError as error:
        raise MissingPackage(f"reading {path} needs a package: {in_one_line(error)}") from error
    except Exception as error:
        raise FormatError(f"{path} cannot be read: {in_one_line(error)}") from error
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # Rust's panic, which pyo3 puts beside Exception
            raise
        raise FormatError(f"{path} cannot be read: its reader gave up ({in_one_line(error)})") from error


def check_json_files(folder: Path) -> None:
    """Raise FormatError unless the JSON files and the chat template in a model's folder are such, and of sane sizes."""
    for file in sorted(folder.glob("*.json")):
        read_json(file, LARGEST_TOKENIZER if file.name == "tokenizer.json" else LARGEST)
    for file in sorted(folder.glob("*.jinja")):
        if file.stat().st_size > LARGEST:
            raise FormatError(f"{file} has {file.stat().st_size} bytes; at most {LARGEST} are allowed")


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer in a folder; no code from it runs, nothing is fetched.

    Raises:
        FormatError: its files are broken, larger than any published ones, or make a tokenizer that cannot tokenize.
    """
    from transformers import AutoTokenizer

    file = folder / "tokenizer.json"
    if file.is_file():
        _check_tokenizer(file, read_json(file, LARGEST_TOKENIZER))
    with reading(folder):
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        _check_origin(folder, tokenizer)
        longest = tokenizer.model_max_length
        if isinstance(longest, bool) or not isinstance(longest, int | float) or not longest > 0:
            raise FormatError(f"{folder / 'tokenizer_config.json'}: model_max_length is {str(longest)[:40]}, no length")
        tokenizer("a b hello \u2603 1", verbose=False)  # what is broken shows here, not at the user's first text
    return tokenizer


def _check_origin(folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise FormatError for a tokenizer made of no file: some versions of transformers give an empty one for none."""
    names = {str(name) for name in tokenizer.vocab_files_names.values()}
    others = ("*.model", "*.tiktoken", "tekken.json")
    if names and not any((folder / name).is_file() for name in names) and not any(map(any, map(folder.glob, others))):
        raise FormatError(f"{folder} cannot be read: it has no file of a tokenizer, such as {', '.join(sorted(names))}")


def _check_tokenizer(path: Path, tree: Any) -> None:
    """Raise FormatError where a tokenizer's lists are beyond any published one, or ask for memory at every text."""
    if not isinstance(tree, dict):
        raise FormatError(f"{path} holds {type(tree).__name__} where a JSON object is needed")
    model = tree.get("model")
    parts = {"added_tokens": tree.get("added_tokens")}
    if isinstance(model, dict):
        parts |= {"vocab": model.get("vocab"), "merges": model.get("merges")}
    for name, value in parts.items():
        if isinstance(value, list | dict) and len(value) > MOST_ENTRIES:
            raise FormatError(f"{path}: {name} has {len(value)} entries; at most {MOST_ENTRIES} are allowed")
    padding = tree.get("padding")
    if isinstance(padding, dict):
        strategy = padding.get("strategy")
        lengths = [padding.get("pad_to_multiple_of"), strategy.get("Fixed") if isinstance(strategy, dict) else None]
        if any(isinstance(length, int) and length > LONGEST_PADDING for length in lengths):
            raise FormatError(f"{path} fills every text to more than {LONGEST_PADDING} tokens")
