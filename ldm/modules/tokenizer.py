"""CLIP's tokenizer, from whichever place has it: a folder or file, an installed open_clip_torch, or the hub."""

from __future__ import annotations

import gzip
import os
import zlib
from importlib import metadata
from pathlib import Path

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError
from transformers import CLIPTokenizer

from ldm.errors import UserError

VOCABULARY = "bpe_simple_vocab_16e6.txt.gz"
FILES = ("vocab.json", "merges.txt")
FILES_READ = (*FILES, "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
MAX_BYTES = 2**24  # of one of its files; CLIP's are below 4 MB
HUB_NAME = "openai/clip-vit-large-patch14"
NUM_MERGES = 49152 - 256 - 2
NUM_WORDS = 49408


def find_tokenizer(path: str | Path | None = None) -> CLIPTokenizer:
    """CLIP's tokenizer, 49,408 words.

    path: a folder with `vocab.json` and `merges.txt` (or with such a folder `tokenizer/`), or the vocabulary file
        `bpe_simple_vocab_16e6.txt.gz`. None: the vocabulary inside an installed open_clip_torch, which is read without
        being imported, else what the hub gave earlier. The hub itself is asked only where HF_HUB_OFFLINE=0 says so.

    Raises `UserError` where none is found.
    """
    if path is not None:
        return _from_path(Path(path))
    vocabulary = _open_clip_vocabulary()
    if vocabulary is not None:
        return _from_vocabulary(vocabulary)
    offline = os.environ.get("HF_HUB_OFFLINE", "1").upper() not in ("0", "FALSE", "NO", "OFF")
    try:
        files = [hf_hub_download(HUB_NAME, name, local_files_only=offline) for name in FILES]
    except (OSError, ValueError, HfHubHTTPError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            "CLIP's tokenizer was not found in any of three places: no folder was given (cond_stage_config.params."
            f"tokenizer), open_clip_torch is not installed, and the hub did not give {HUB_NAME} ({reason}). Install "
            "the vocabulary with `pip install --no-deps open_clip_torch`, set tokenizer to a folder with vocab.json "
            "and merges.txt, or set HF_HUB_OFFLINE=0 in the environment to have it fetched."
        ) from None
    return _from_folder(Path(files[0]).parent)


def _from_path(path: Path) -> CLIPTokenizer:
    if path.is_file():
        return _from_vocabulary(path)
    for folder in (path, path / "tokenizer"):
        if all((folder / name).is_file() for name in FILES):
            return _from_folder(folder)
    raise UserError(
        f"tokenizer {path}: expected a folder with vocab.json and merges.txt, or the file {VOCABULARY}, found neither. "
        "Correct the path, or leave tokenizer out to have it searched for."
    )


def _from_folder(folder: Path) -> CLIPTokenizer:
    for path in folder.glob("*.*"):
        if path.name in FILES_READ and path.stat().st_size > MAX_BYTES:
            raise UserError(f"tokenizer {path}: expected at most {MAX_BYTES:,} bytes, found {path.stat().st_size:,}")
    try:
        tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # the tokenizers library raises bare Exception on a broken file
        raise UserError(f"tokenizer {folder}: {' and '.join(FILES)} cannot be read ({error})") from None
    if len(tokenizer) != NUM_WORDS:
        raise UserError(f"tokenizer {folder}: expected CLIP's {NUM_WORDS:,} words, found {len(tokenizer):,}")
    return tokenizer


def _open_clip_vocabulary() -> Path | None:
    try:
        path = Path(metadata.distribution("open_clip_torch").locate_file(f"open_clip/{VOCABULARY}"))
    except metadata.PackageNotFoundError:
        return None
    return path if path.is_file() else None


def _from_vocabulary(path: Path) -> CLIPTokenizer:
    """Build the tokenizer from OpenAI's list of merges, from which the words follow."""
    try:
        with gzip.open(path) as file:
            content = file.read(MAX_BYTES + 1)
        if len(content) > MAX_BYTES:
            raise EOFError(f"it unpacks to more than {MAX_BYTES:,} bytes")
        lines = content.decode("utf-8").split("\n")
    except (zlib.error, OSError, EOFError, UnicodeDecodeError) as error:
        raise UserError(
            f"tokenizer {path}: expected the vocabulary {VOCABULARY}, found a file that cannot be read ({error})"
        ) from None
    merges = [tuple(line.split()) for line in lines[1 : NUM_MERGES + 1]]
    letters = _byte_letters()
    words = [*letters, *(f"{letter}</w>" for letter in letters), *("".join(pair) for pair in merges)]
    vocabulary = {word: number for number, word in enumerate([*words, "<|startoftext|>", "<|endoftext|>"])}
    if len(vocabulary) != NUM_WORDS or any(len(pair) != 2 for pair in merges):
        raise UserError(
            f"tokenizer {path}: expected the vocabulary {VOCABULARY} with {NUM_WORDS:,} words, found "
            f"{len(vocabulary):,}. Install open_clip_torch again."
        )
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=77)


def _byte_letters() -> list[str]:
    """One printable letter for each byte: those that print first, then the others moved beyond them."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) for byte in printable] + [chr(256 + number) for number in range(len(hidden))]
