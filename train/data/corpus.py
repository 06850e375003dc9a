"""Text in, batches of tokens out.

Two routes lead to the same batches:

* *Local text* (files, a directory, or the Python standard library's own source)
  is tokenised once into a small TFDS dataset in the cache, then read at random.
  A batch depends on nothing but (fingerprint, batch, seq, seed, position).
* *A TFDS text dataset* (`tfds:c4/en`) is read where it lies, tokenised on the
  fly and packed: preparing it a second time would double hundreds of gigabytes.

Nothing here needs TensorFlow or the network.
"""

import functools
import platform
from pathlib import Path

from train.data import prepared, streamed
from train.data.batches import TextData
from train.data.coder import coder_of
from train.data.documents import read_documents, standard_library, text_files


def load(
    data: str | None,
    tokenizer: str | None,
    *,
    seq: int,
    cache: Path,
    data_dir: str | None = None,
    held_batches: int | None = None,
    progress: bool = True,
) -> TextData:
    """Finds text, and prepares it unless that was done before.

    Args:
      data: A text file (one document), a `.jsonl`, `.json` or `.parquet` file (a document
        is a row's field `text`), compressed or not, a directory or a pattern of such
        files, `tfds:NAME` (a TFDS dataset already prepared, with a feature `text`), or
        None for the Python standard library's own source.
      tokenizer: Path of a `tokenizer.json`, or None for bytes: 256 tokens, byte 0
        separates documents.
      seq: Predicted tokens per row.
      cache: Where prepared tokens live, one folder per fingerprint. Preparing needs
        about two bytes of memory per token.
      data_dir: Where TFDS datasets lie; None is TFDS's own default.
      held_batches: Batches of the held-out split to read, at most.
      progress: Shows a bar while preparing, if standard error is a terminal.

    Raises:
      DataError: if the text or the tokenizer is missing, empty or unreadable, or a split
        of local text too short for one row.

    Example:
      >>> data = load(None, None, seq=256, cache=Path(tempfile.mkdtemp()), progress=False)
      >>> next(data.train(batch=8, seed=0))["tokens"].shape
      (8, 257)
    """
    coder = coder_of(tokenizer)
    rows = (seq, held_batches)
    if data is not None and data.startswith("tfds:"):
        name = data.removeprefix("tfds:")
        return streamed.open_text(name, data_dir, coder, *rows, progress)
    files, note = (standard_library(), "") if data is None else text_files(data)
    read = functools.partial(read_documents, files, skip_undecodable=data is None)
    name = data or f"Python {platform.python_version()} standard library"
    return prepared.prepare(name, read, coder, Path(cache), progress, *rows, note)
