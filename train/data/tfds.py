"""TFDS datasets that are prepared already, without their code and without the network."""

import os
from collections.abc import Sequence
from typing import Any

import tensorflow_datasets as tfds
from tensorflow_datasets.core import read_only_builder

from train.errors import DataError


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
        builder = read_only_builder.builder_from_files(name, data_dir=data_dir)
    except ValueError as error:
        raise DataError(
            f"tfds:{name} is not prepared in {where}; check the name (NAME/CONFIG:"
            f"VERSION) and the data directory, or prepare it once with `tfds build"
            f" {name} --file_format=array_record --data_dir={where}` (c4 also needs"
            " Apache Beam, and days on one machine)"
        ) from error
    return builder, where


def random_access(
    builder: tfds.core.DatasetBuilder, where: str, **splits: str
) -> dict[str, Sequence[Any]]:
    """The records of some splits, each named as its keyword.

    Raises:
      DataError: if the files have an order that cannot be left.
    """
    try:
        return {
            key: builder.as_data_source(split=split) for key, split in splits.items()
        }
    except NotImplementedError as error:
        info = builder.info
        raise DataError(
            f"tfds:{info.full_name} in {where}: stored as {info.file_format.value},"
            " which cannot be read at random; prepare it with"
            " --file_format=array_record"
        ) from error
