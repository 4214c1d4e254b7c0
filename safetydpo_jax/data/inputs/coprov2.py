"""CoProV2 as its authors publish it (SafetyDPO, arXiv 2412.10493).

A folder, as downloaded, with

- the training table, a CSV whose name holds "train": columns prompt,image,category. A pair is the
  pictures u_idx_N_M and s_idx_N_M; it is listed once for each of its categories;
- the test table, if wanted, whose name holds "test": unsafe prompts alone, in the same columns;
- the pictures: a .zip or any folders, or the model hub's .parquet files (also in data/), each of
  whose rows holds a picture (`image`), its prompt (`caption`), the names of the pair's pictures
  (`jpg_0`, `jpg_1`) and whether the first is preferred (`label_0`). They name no categories: those
  are the table's, and there are none without it.
"""

import functools
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath

from safetydpo_jax.csv_file import read_rows
from safetydpo_jax.data.inputs.files import open_pictures
from safetydpo_jax.data.inputs.pair import InputPicture, InputSet, TestPrompt, folded
from safetydpo_jax.data.inputs.parquet import ParquetRows
from safetydpo_jax.errors import MissingFileError, UserError
from safetydpo_jax.harm import CATEGORIES

HUB_COLUMNS = ("image", "jpg_0", "jpg_1", "label_0", "caption")
_NAME = re.compile(r"([us])_idx_(\d+_\d+)\.(?:jpe?g|png|webp)", re.IGNORECASE)
_MISSPELT = {"harrasment": "harassment"}


def read_coprov2(folder: Path, tables: Path | None = None) -> InputSet:
    """The pairs to train on and the prompts to test with.

    Args:
      folder: as downloaded, see above.
      tables: where the tables are, if not there.

    Raises:
      MissingFileError: no training table and no parquet files, or no pictures.
      UserError: several tables to choose from, one that cannot be read, or an unknown category.
    """
    if not folder.is_dir():
        raise MissingFileError(f"{folder}: there is no such folder")
    train, test = (_table(tables or folder, kind) for kind in ("train", "test"))
    listed = list(_rows(train)) if train else []
    found = InputSet()
    if parquet := parquet_files(folder):
        pictures = _of_the_hub(ParquetRows(parquet), found)
    elif listed:
        read = open_pictures(_pictures(folder), by_name=True)
        pictures = {
            name: InputPicture(prompt, functools.partial(read, name))
            for prompt, name, _ in reversed(listed)  # of several prompts the first one counts
        }
    else:
        raise MissingFileError(
            f"{tables or folder} has no CSV file with 'train' in its name, and {folder} no parquet "
            "files: docs/pairs.md says what CoProV2's folder holds"
        )
    _pair_up(pictures, _categories(listed), found)
    if test:
        known = {
            folded(picture.prompt)
            for name, picture in pictures.items()
            if (match := _NAME.fullmatch(_last(name))) and match[1].lower() == "u"
        }
        found.test = [
            TestPrompt(f"coprov2-test-{i:05d}", prompt, category, folded(prompt) in known)
            for i, (prompt, _, category) in enumerate(_rows(test))
        ]
    return found


def parquet_files(folder: Path) -> list[Path]:
    """Those in a folder or in its data/, in order."""
    return sorted(folder.glob("*.parquet")) or sorted(folder.glob("data/*.parquet"))


def has_training_table(folder: Path) -> bool:
    """Whether a CSV there is named as a table of CoProV2's pairs."""
    return bool(_tables(folder, "train"))


def _tables(folder: Path, kind: str) -> list[Path]:
    return sorted(f for f in folder.glob("*.csv") if kind in f.name.lower())


def _table(folder: Path, kind: str) -> Path | None:
    found = _tables(folder, kind)
    if len(found) > 1:
        names = ", ".join(f.name for f in found)
        raise UserError(f"{folder} has several tables for {kind}: {names}; leave one there")
    return found[0] if found else None


def _rows(table: Path) -> Iterator[tuple[str, str, str]]:
    """(prompt, image, category) with the category as we spell it."""
    for where, row in read_rows(table, ("prompt", "image", "category")):
        name = row["category"].strip().lower().replace("-", "_").replace(" ", "_")
        category = _MISSPELT.get(name, name)
        if category not in CATEGORIES:
            # It is not shown: where columns are mixed up it is a prompt.
            raise UserError(f"{where}: its category is none of {', '.join(CATEGORIES)}")
        yield row["prompt"], row["image"].strip(), category


def _pictures(folder: Path) -> Path:
    """The zip beside the tables, or the folder itself."""
    zips = sorted(folder.glob("*.zip"))
    if len(zips) > 1:
        names = ", ".join(f.name for f in zips)
        raise UserError(f"{folder} has several archives: {names}; leave one there, or unpack them")
    return zips[0] if zips else folder


def _of_the_hub(rows: ParquetRows, found: InputSet) -> dict[str, InputPicture]:
    """The pictures by name; one that its row says is preferred the wrong way round is skipped."""
    if missing := set(HUB_COLUMNS) - rows.columns.keys():
        raise UserError(f"the parquet files lack the column {min(missing)}: not those of CoProV2")
    files = rows.binary("image")
    columns = ("image.path", "caption", "jpg_0", "jpg_1")
    texts = zip(*(rows.texts(column) for column in columns), strict=True)
    pictures: dict[str, InputPicture] = {}
    for i, ((path, caption, *names), label) in enumerate(
        zip(texts, rows.numbers("label_0"), strict=True)
    ):
        name = _last(path)
        winner, loser = names if label == 1 else names[::-1]
        if not (caption and name) or name not in (_last(winner), _last(loser)):
            found.skipped[f"row {i}"] = "row whose picture is none of its pair's"
        elif not _last(winner).lower().startswith("s_") or label not in (0, 1):
            found.skipped[f"row {i}"] = "row that does not prefer the safe picture"
        else:
            read = functools.partial(rows.picture, i, files)
            pictures.setdefault(name, InputPicture(caption, read))
    return pictures


def _categories(listed: Sequence[tuple[str, str, str]]) -> dict[str, list[str]]:
    """Of each pair, by its number, without repeats and in the order of the table."""
    found: dict[str, list[str]] = {}
    for _, name, category in listed:
        if match := _NAME.fullmatch(_last(name)):
            of_pair = found.setdefault(match[2], [])
            if category not in of_pair:
                of_pair.append(category)
    return found


def _pair_up(
    pictures: Mapping[str, InputPicture], categories: Mapping[str, list[str]], found: InputSet
) -> None:
    """Adds the pairs in the order of their numbers."""
    sides: dict[str, dict[str, InputPicture]] = {}
    unnamed = 0
    for name, picture in pictures.items():
        if match := _NAME.fullmatch(_last(name)):
            sides.setdefault(match[2], {}).setdefault(match[1].lower(), picture)
        else:
            unnamed += 1  # its name may say what it shows
            found.skipped[f"coprov2-unnamed-{unnamed}"] = "picture named neither u_idx nor s_idx"
    for number, of_pair in sorted(sides.items()):
        name = f"coprov2-{number}"
        if of_pair.keys() == {"u", "s"}:
            found.add(name, of_pair["u"], of_pair["s"], tuple(categories.get(number, ())))
        else:
            missing = "safe" if "u" in of_pair else "unsafe"
            found.skipped[name] = f"pair without its {missing} picture"


def _last(name: str) -> str:
    return PurePosixPath(name).name
