"""Data sets of Hugging Face: of the Hub, or local in the formats that the package datasets reads."""

import re
import sys
from collections.abc import Mapping, Sequence
from functools import cached_property
from importlib.util import find_spec
from logging import getLogger
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from src.data.decode import problem
from src.data.folder_index import printable
from src.data.folder_layout import SPLIT_FOLDERS, held_out
from src.data.folder_report import report_classes
from src.data.indexed import Catalogue, Entry, IndexedSource
from src.data.source import CACHE, SPLITS, Split, user_path
from src.data.table_index import TableIndex, path_of, split_of
from src.errors import UserError

if TYPE_CHECKING:
    from datasets import Dataset

log = getLogger(__name__)

ON_THE_HUB = re.compile(r"\w[\w.-]*/\w[\w.-]*")
SAVED = ("state.json", "dataset_dict.json")
"""Files in a folder written by `save_to_disk`: of one split, of several."""


class HuggingFace(IndexedSource):
    """Images in a table with a column of images, and perhaps one of labels and one of captions.

    Every image is decoded once before the first run, as in `ImageFolder`. No code of a data set is run: the package
    datasets reads tables and files only. Sets of the Hub stay in the cache of Hugging Face (HF_HOME).

    Splits: `splits` names the set's split for each of train, validation and test. null is the split of that name (or
    valid, val, training, testing) if there is one. A missing one of validation and test is the same as the other. If
    both are missing, a hash of each image's bytes decides, so that copies of an image are in one split.

    Labels: a column of classes, of texts (in alphabetical order) or of integers from 0.

    Captions: a column of texts, or of lists of texts, of which the first is used. A row without a caption or label is
    faulty, like one whose image cannot be decoded.

    Args:
        path: a folder of parquet files, of images (with captions in metadata.csv or metadata.jsonl), or written by
            `save_to_disk`; a parquet file; or a set of the Hub, as owner/name.
        image_size: of the images given out, in pixels: one number, or [height, width].
        name: the set's configuration, if it has several.
        image_column: null is the only column of images.
        label_column: used only with num_classes > 0.
        caption_column: null for no captions.
        splits: the set's splits, by the names train, validation and test.
        num_classes: number of classes, or 0 for an unlabelled set.

    The other arguments are those of `ImageFolder`.
    """

    name = "huggingface"

    def __init__(
        self,
        path: str | None,
        image_size: int | Sequence[int],
        name: str | None = None,
        image_column: str | None = None,
        label_column: str = "label",
        caption_column: str | None = None,
        splits: dict[str, str | None] | None = None,
        channels: int = 3,
        num_classes: int = 0,
        horizontal_flip: bool = False,
        holdout: float = 0.05,
        min_size: int = 1,
        on_error: str = "stop",
        white: float | None = None,
        memory_limit_mb: float = 2048,
        cache: str = CACHE,
    ):
        super().__init__(
            *(image_size, channels, num_classes, horizontal_flip, holdout),
            *(min_size, on_error, white, memory_limit_mb, cache),
        )
        if not set(splits or ()) <= set(SPLITS):
            raise ValueError(f"splits must name train, validation or test, got {', '.join(splits)}")
        self.path = path
        self.configuration = name
        self.image_column = image_column
        self.label_column = label_column
        self.caption_column = caption_column
        self.splits = splits or {}
        self.captioned = caption_column is not None

    @property
    def class_names(self) -> list[str]:
        return list(self._classes)

    def check(self) -> None:
        if self.path is None:
            raise UserError(
                "data.path is not set: data=huggingface needs data.path=FOLDER, FILE.parquet or OWNER/NAME"
            )
        spec = find_spec("datasets")
        if spec is None or spec.origin is None:  # no origin: a folder of that name
            raise UserError("data=huggingface needs the package datasets: pip install -e '.[huggingface]'")
        if not self._local.exists() and not ON_THE_HUB.fullmatch(self.path):
            raise UserError(
                f"{self._where}: no such folder or file; a set of the Hub is named by owner/name, e.g. ylecun/mnist"
            )
        if self._local.is_file() and self._local.suffix != ".parquet":
            raise UserError(f"{self._where} is no parquet file: give one, or a folder")

    @cached_property
    def _local(self) -> Path:
        return user_path(self.path, "data.path").absolute()

    @property
    def _where(self) -> str:
        return f"data.path={printable(self.path)}"

    @cached_property
    def _loaded(self) -> Mapping[str, "Dataset"]:
        """All splits of the set."""
        self.check()
        try:
            return self._load_tables()
        except MemoryError:
            raise
        # A damaged file, a changed service or a full disk can make the package raise anything.
        except Exception as error:
            reason = problem(error.__cause__ or error)[:300]
            raise UserError(
                f"{self._where} cannot be loaded ({reason}): set data.path to a folder, a parquet file or a set of "
                "the Hub, and data.name to its configuration if it has several"
            ) from error

    def _load_tables(self) -> Mapping[str, "Dataset"]:
        import datasets

        if not sys.stderr.isatty():
            datasets.disable_progress_bars()
        if not self._local.exists():
            return datasets.load_dataset(self.path, self.configuration)
        place, cache = str(self._local), str(self.cache / "tables")
        if self._local.is_file():
            return {"train": datasets.Dataset.from_parquet(place, cache_dir=cache)}
        if any((self._local / name).is_file() for name in SAVED):
            saved = datasets.load_from_disk(place)
            return {"train": saved} if isinstance(saved, datasets.Dataset) else saved
        return datasets.load_dataset(place, self.configuration, cache_dir=cache)

    @cached_property
    def _names(self) -> dict[Split, str | None]:
        """The set's name of each split; None for validation and test where the set has neither."""
        names = {}
        for split in SPLITS:
            given = self.splits.get(split)
            name = given or next((name for name in SPLIT_FOLDERS[split] if name in self._loaded), None)
            if name not in self._loaded and (given or split == "train"):
                raise UserError(
                    f"{self._where} has no split {name or split}, it has {', '.join(self._loaded)}: "
                    f"set data.splits.{split} to one of them"
                )
            names[split] = name
        names["validation"] = names["validation"] or names["test"]
        names["test"] = names["test"] or names["validation"]
        return names

    @cached_property
    def _tables(self) -> dict[str, "Dataset"]:
        """The splits of the set that are used."""
        tables = {name: self._loaded[name] for name in dict.fromkeys(self._names.values()) if name}
        for option in ("image_column", *(["label_column"] * (self.num_classes > 0)), "caption_column"):
            column = getattr(self, option)
            for name, table in tables.items():
                if column is not None and column not in table.column_names:
                    raise UserError(
                        f"data.{option}={column}: {self._where} has no such column in its split {name}, it has "
                        f"{', '.join(table.column_names)}"
                    )
        return tables

    @cached_property
    def _images(self) -> TableIndex:
        from datasets import Image

        column = self.image_column
        if column is None:
            features = next(iter(self._tables.values())).features
            columns = [name for name, feature in features.items() if isinstance(feature, Image)]
            if len(columns) != 1:
                raise UserError(
                    f"{self._where} has {len(columns)} columns of images: set data.image_column to one of "
                    f"{', '.join(columns or features)}"
                )
            (column,) = columns
        tables = {}
        for name, table in self._tables.items():
            tables[name] = table.select_columns(column)
            if isinstance(table.features[column], Image):
                tables[name] = tables[name].cast_column(column, Image(decode=False))
        return TableIndex(
            source=f"{self._local if self._local.exists() else self.path} {self.configuration} {column}",
            column=column,
            tables=tables,
            cache=self.cache,
            image_shape=self.image_shape,
            white=self.white,
        )

    @cached_property
    def _classes(self) -> list[str]:
        """The names of the classes.

        Raises:
            UserError: num_classes is another number, or the column does not hold labels.
        """
        if not self.num_classes:
            return []
        feature = next(iter(self._tables.values())).features[self.label_column]
        kind = getattr(feature, "dtype", "")
        if hasattr(feature, "names"):
            return self._counted(feature.names)
        if "string" not in kind and "int" not in kind and kind != "bool":
            raise UserError(
                f"data.label_column={self.label_column}: {self._where} holds {feature} there, not texts or integers; "
                f"its columns are {', '.join(next(iter(self._tables.values())).column_names)}"
            )
        values = {value for table in self._tables.values() for value in table.unique(self.label_column)} - {
            None
        }
        if "string" in kind:
            return self._counted(sorted(values))
        count = max([self.num_classes, *(int(value) + 1 for value in values)])
        return self._counted(range(count))

    def _counted(self, names: Sequence[str | int]) -> list[str]:
        if len(names) != self.num_classes:
            shown = ", ".join(map(str, names[:5])) + (", ..." if len(names) > 5 else "")
            raise UserError(
                f"{self._where} has {len(names)} classes ({shown}), not data.num_classes={self.num_classes}: "
                f"set data.num_classes={len(names)}, or 0 for no labels"
            )
        return [str(name) for name in names]

    @cached_property
    def _rows(self) -> dict[str, "Row"]:
        """Label and caption of every image, by its path."""
        labels = {name: label for label, name in enumerate(self._classes)}
        rows = {}
        for name, table in self._tables.items():
            nothing = [None] * len(table)
            classes = table[self.label_column][:] if self.num_classes else nothing
            captions = table[self.caption_column][:] if self.captioned else nothing
            for i, (label, caption) in enumerate(zip(classes, captions, strict=True)):
                label = labels.get(label) if isinstance(label, str) else label
                rows[path_of(name, i)] = Row(label, text_of(caption))
        return rows

    def _index(self) -> Catalogue:
        index = self._images  # a wrong column is reported before the rows are read
        unusable = {}
        for path, row in self._rows.items():
            if self.num_classes and (row.label is None or row.label < 0):
                unusable[path] = "no label"
            elif self.captioned and not row.caption:
                unusable[path] = "no caption"
        catalogue = self._examine(index.files(), unusable)
        if self.num_classes:
            report_classes(self._where, self.class_names)
        return catalogue

    def _splits(self, entry: Entry) -> set[Split]:
        if self._names["validation"] is None:
            return {held_out(int(entry.record.digest, 16), self.holdout)}
        return {split for split, name in self._names.items() if name == split_of(entry.path)}

    def _label(self, path: str) -> int:
        return self._rows[path].label

    def _caption(self, path: str) -> str:
        return self._rows[path].caption

    def _report_empty(self, split: Split) -> None:
        if split == "train":
            raise UserError(f"{self._where} has no training images: set data.splits.train, or data.holdout=0")
        if split == "validation" and (self._names["validation"] or self.holdout):
            log.warning("%s has no validation images, so there will be no validation loss", self._where)


class Row(NamedTuple):
    """Attributes:
    label: class, or None.
    caption: "" if there is none.
    """

    label: int | None
    caption: str


def text_of(caption: Any) -> str:
    """A caption without white space around it; of several the first; "" for anything else."""
    if isinstance(caption, list):
        caption = caption[0] if caption else None
    return caption.strip() if isinstance(caption, str) else ""
