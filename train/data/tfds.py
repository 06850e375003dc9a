"""TFDS datasets that are prepared already, without their code and without the network."""

import json
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds
from tensorflow_datasets.core import read_only_builder
from tensorflow_datasets.core.utils import error_utils

from train.data.text import read_text
from train.errors import DataError

_LARGEST = 1 << 24  # bytes of a dataset's JSON files
_CORE = "tensorflow_datasets.core.features."
FEATURES = {
    _CORE + name
    for name in (
        "features_dict.FeaturesDict",
        "tensor_feature.Tensor",
        "scalar.Scalar",
        "text_feature.Text",
        "class_label_feature.ClassLabel",
        "sequence_feature.Sequence",
        "translation_feature.Translation",
    )
}
"""Classes that a dataset's features.json may name."""


def open_prepared(
    name: str, data_dir: str | None
) -> tuple[tfds.core.DatasetBuilder, str]:
    """Opens a prepared TFDS dataset, without its code and without preparing it.

    Returns:
      The dataset, and the data directory for messages.

    Raises:
      DataError: if it is not there.
    """
    where = data_dir or os.environ.get("TFDS_DATA_DIR", "~/tensorflow_datasets")
    try:
        # From the files alone: the class behind a name such as c4 may need
        # TensorFlow or Beam, and tfds.builder would look for it first.
        found = error_utils.reraise_with_context(ValueError)(
            read_only_builder._find_builder_dir
        )
        folder = found(name, data_dir=data_dir)
        if folder is None:
            raise ValueError("not found")
    except ValueError as error:
        raise DataError(
            f"tfds:{name} is not prepared in {where}; check the name (NAME/CONFIG:"
            f"VERSION) and the data directory, or prepare it once with `tfds build"
            f" {name} --file_format=array_record --data_dir={where}` (c4 also needs"
            " Apache Beam, and days on one machine)"
        ) from error
    folder = Path(folder)
    _check_features(folder / "features.json")
    _check_info(folder / "dataset_info.json")
    try:
        builder = tfds.builder_from_directory(folder)
        paths = [p for split in builder.info.splits.values() for p in split.filepaths]
    except Exception as error:  # whatever a stranger's file makes TFDS stumble over
        said = " ".join(str(error).split())[:200] or type(error).__name__
        raise DataError(
            f"{folder} cannot be opened as a TFDS dataset: {said}"
        ) from None
    root = folder.resolve()
    for path in map(Path, paths):
        if root not in path.parent.resolve().parents and root != path.parent.resolve():
            raise DataError(
                f"{folder / 'dataset_info.json'}: {path} is outside its folder"
            )
    return builder, where


def _check_features(path: Path) -> None:
    """TFDS imports what a feature's class is called, whatever it is."""
    for value in _values(_content(path)):
        for key in ("pythonClassName", "python_class_name", "type"):
            named = value.get(key)
            if isinstance(named, str) and named not in FEATURES:
                raise DataError(
                    f"{path}: the feature class {named!r} is none of TFDS's own that hold"
                    f" text and numbers, and code of others is not run"
                )
        if any("/" in key or "\\" in key for key in value):
            raise DataError(f"{path}: a feature's name has a slash in it")


def _check_info(path: Path) -> None:
    """Counts that can be, and names of files that stay in the folder."""
    content = _content(path)
    splits = content.get("splits", [])
    if not isinstance(splits, list):
        raise DataError(f"{path}: splits are no list but {str(splits)[:60]!r}")
    for split in splits:
        if not isinstance(split, dict):
            raise DataError(f"{path}: a split is no object but {str(split)[:60]!r}")
        lengths = split.get("shardLengths", [])
        if not isinstance(lengths, list):
            raise DataError(
                f"{path}: shardLengths are no list but {str(lengths)[:60]!r}"
            )
        for length in lengths:
            if not re.fullmatch("[0-9]{1,12}", str(length)):
                raise DataError(
                    f"{path}: split {split.get('name')!r} has a shard of"
                    f" {str(length)[:40]!r} examples, expected a number below 10^12"
                )
        template = split.get("filepathTemplate", "")
        if not re.fullmatch(r"(\w|[-.]|\{[A-Z_]+\})*", str(template)):
            raise DataError(
                f"{path}: filepathTemplate {str(template)[:80]!r} is no name"
            )
    for name in (content.get("name", ""), *(split.get("name", "") for split in splits)):
        if not re.fullmatch(r"[\w.-]*", str(name)):
            raise DataError(
                f"{path}: {str(name)[:80]!r} is no name of a dataset or a split"
            )


def _content(path: Path) -> dict[str, Any]:
    """The object in a JSON file of a dataset."""
    try:
        if path.stat().st_size > _LARGEST:
            raise DataError(
                f"{path} has {path.stat().st_size:,} bytes, more than {_LARGEST:,}"
            )
        content = json.loads(read_text(path))
    except (OSError, ValueError, RecursionError) as error:
        said = " ".join(str(error).split())[:200]
        raise DataError(f"{path} cannot be read: {said}") from error
    if not isinstance(content, dict):
        raise DataError(f"{path} is no JSON object")
    return content


def _values(value: Any) -> Iterator[dict[str, Any]]:
    """All objects in what JSON says, at any depth."""
    waiting = [value]
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            yield value
            waiting += value.values()
            if isinstance(inner := value.get("json"), str):  # features in a string
                try:
                    waiting.append(json.loads(inner))
                except (ValueError, RecursionError):
                    continue
        elif isinstance(value, list):
            waiting += value


class _Records(Sequence):
    """The records of a split; one that cannot be read is named."""

    def __init__(self, source: Sequence[Any], place: str):
        self.source, self.place = source, place

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: Any) -> Any:
        try:
            return self.source[index]
        except Exception as error:  # protobuf's, array_record's, numpy's, zlib's
            said = " ".join(str(error).split())[:200] or type(error).__name__
            raise DataError(f"{self.place} {index} cannot be read: {said}") from error


def random_access(
    builder: tfds.core.DatasetBuilder, where: str, **splits: str
) -> dict[str, Sequence[Any]]:
    """The records of some splits, each named as its keyword.

    Raises:
      DataError: if the files have an order that cannot be left.
    """
    info = builder.info
    found: dict[str, Sequence[Any]] = {}
    place = f"tfds:{info.full_name} in {where}"
    try:
        for key, split in splits.items():
            source = builder.as_data_source(split=split)
            found[key] = _Records(source, f"{place}, {split}")
    except NotImplementedError as error:
        raise DataError(
            f"{place}: stored as {info.file_format.value},"
            " which cannot be read at random; prepare it with"
            " --file_format=array_record"
        ) from error
    except Exception as error:
        said = " ".join(str(error).split())[:200] or type(error).__name__
        raise DataError(f"{place} cannot be read: {said}") from error
    return found
