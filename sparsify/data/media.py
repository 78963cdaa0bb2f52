"""Pictures and recordings with a class label: local folders, tables that name files, or a `datasets` name.

A folder has one folder a class (`cat/1.png`), or a `metadata.csv` or `metadata.jsonl` whose columns `file_name` and
`label` say what is what. Files are read and decoded when a batch is made, not before. Recordings are WAV files with PCM
samples, which the standard library reads; several channels are averaged.
"""

from __future__ import annotations

import io
import wave
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sparsify.data.files import read_file
from sparsify.data.labels import class_numbers
from sparsify.data.tables import Source, chosen_columns, read_table, title
from sparsify.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset
    from PIL.Image import Image

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff")
SOUND_SUFFIXES = (".wav",)
MEDIA_SUFFIXES = (*IMAGE_SUFFIXES, *SOUND_SUFFIXES)
METADATA = ("metadata.csv", "metadata.jsonl")
IMAGE_COLUMNS = (("image", "label"), ("img", "label"), ("file_name", "label"), ("image", "fine_label"))
SOUND_COLUMNS = (("audio", "label"), ("file_name", "label"))


@dataclass(frozen=True)
class Kind:
    """Pictures or recordings: suffixes of their files, usual columns, and what they are called."""

    suffixes: tuple[str, ...]
    columns: tuple[tuple[str, ...], ...]
    name: str


IMAGES = Kind(IMAGE_SUFFIXES, IMAGE_COLUMNS, "pictures")
SOUNDS = Kind(SOUND_SUFFIXES, SOUND_COLUMNS, "recordings")


def is_media(path: Path) -> bool:
    """Whether a path is a folder with pictures or recordings in it."""
    return path.is_dir() and any(file.suffix.lower() in MEDIA_SUFFIXES for file in path.rglob("*"))


def media_files(path: Path) -> list[Path]:
    """The folder's pictures, recordings and metadata, sorted by path."""
    return sorted(
        file
        for file in path.rglob("*")
        if file.is_file() and (file.suffix.lower() in MEDIA_SUFFIXES or file.name in METADATA)
    )


def image_samples(spec: Source, label2id: dict[str, int] | None = None) -> Dataset:
    """Pictures with their class.

    Args:
        spec: A folder, a table of file names, or a named data set.
        label2id: The model's classes; see `sparsify.data.labels`.

    Returns:
        Columns `media` (`bytes` or `path` of the file) and `labels` (int); `decode_image` reads the first.

    Raises:
        DataError: If there are none, a file is missing, or a label is none of the model's.
    """
    return _samples(spec, IMAGES, label2id)


def speech_samples(spec: Source, label2id: dict[str, int] | None = None) -> Dataset:
    """Recordings with their class, as `image_samples` gives pictures; `decode_sound` reads them."""
    return _samples(spec, SOUNDS, label2id)


def decode_image(media: dict[str, Any]) -> Image:
    """The picture in RGB.

    Raises:
        DataError: If the file cannot be read.
    """
    from PIL import Image

    try:
        with Image.open(_opened(media)) as image:
            return image.convert("RGB")
    except OSError as error:
        raise DataError(f"cannot read picture {media.get('path')}: {error}") from error


def decode_sound(media: dict[str, Any], rate: int) -> np.ndarray:
    """The recording as `(samples,)` float32 from -1 to 1, at `rate` samples a second.

    Raises:
        DataError: If it is no WAV file with PCM samples, or has none.
    """
    try:
        with wave.open(_opened(media), "rb") as stream:
            width, channels, own_rate = stream.getsampwidth(), stream.getnchannels(), stream.getframerate()
            content = stream.readframes(stream.getnframes())
    except (OSError, EOFError, wave.Error) as error:
        raise DataError(
            f"cannot read recording {media.get('path')}: {str(error) or 'it ends early'}; only WAV files with "
            f"PCM samples are read, convert others first"
        ) from error
    sound = _as_floats(content, width).reshape(-1, channels).mean(axis=1)
    if len(sound) == 0:
        raise DataError(f"recording {media.get('path')} has no samples")
    return resample(sound, own_rate, rate).astype(np.float32)


def resample(sound: np.ndarray, own_rate: int, rate: int) -> np.ndarray:
    """`(samples,)` at another number of samples a second, by way of its spectrum; frequencies both can hold stay."""
    if own_rate == rate:
        return sound
    count = max(1, round(len(sound) * rate / own_rate))
    spectrum = np.fft.rfft(sound)
    kept = np.zeros(count // 2 + 1, dtype=spectrum.dtype)
    same = min(len(kept), len(spectrum))
    kept[:same] = spectrum[:same]
    return np.fft.irfft(kept, count) * (count / len(sound))


def undecoded(table: Dataset) -> Dataset:
    """The table with its pictures and recordings as the bytes or names of their files."""
    from datasets import Audio, Image

    for name, feature in table.features.items():
        if isinstance(feature, Audio | Image):
            table = table.cast_column(name, type(feature)(decode=False))
    return table


def _as_floats(content: bytes, width: int) -> np.ndarray:
    if width == 1:  # the only width without a sign
        return (np.frombuffer(content, np.uint8).astype(np.float64) - 128) / 128
    if width == 3:
        raw = np.frombuffer(content, np.uint8).reshape(-1, 3)
        padded = np.zeros((len(raw), 4), np.uint8)
        padded[:, 1:] = raw
        return padded.view("<i4").ravel() / 2.0**31
    return np.frombuffer(content, f"<i{width}") / 2.0 ** (8 * width - 1)


def _opened(media: dict[str, Any]) -> Any:
    return io.BytesIO(media["bytes"]) if media.get("bytes") is not None else str(media["path"])


def _samples(spec: Source, kind: Kind, label2id: dict[str, int] | None) -> Dataset:
    from datasets import Dataset

    media, labels = labelled_media(spec, kind, label2id)
    return Dataset.from_dict({"media": media, "labels": class_numbers(labels, label2id, spec)})


def labelled_media(
    spec: Source, kind: Kind, label2id: dict[str, int] | None = None
) -> tuple[list[dict[str, Any]], list[Any]]:
    """Files or bytes and their labels, as the source has them.

    Raises:
        DataError: If there are none, or a file is missing.
    """
    from datasets import ClassLabel

    path = None if spec.path is None else Path(spec.path)
    if path is not None and is_media(path):
        media, labels = _folder(path, kind, spec)
    else:
        if path is not None and path.is_dir():
            raise DataError(f"data folder {path} holds no {kind.name} ({', '.join(kind.suffixes)})")
        table = undecoded(read_table(spec))
        names = chosen_columns(spec, table.column_names, kind.columns, f"columns of {kind.name} and labels")
        media, labels = list(table[names[0]]), list(table[names[1]])
        feature = table.features[names[1]]
        if isinstance(feature, ClassLabel) and label2id and all(n in label2id for n in feature.names):
            labels = [feature.int2str(label) if label >= 0 else label for label in labels]
        media = [_located(one, path, row, kind, spec) for row, one in enumerate(media)]
    media, labels = media[: spec.samples], labels[: spec.samples]
    if not media:
        raise DataError(f"{title(spec)} holds no {kind.name}")
    return media, labels


def _folder(path: Path, kind: Kind, spec: Source) -> tuple[list[dict[str, Any]], list[Any]]:
    """Files of a folder and their labels; in an order that mixes classes, so that its front is a fair sample."""
    metadata = next((path / name for name in METADATA if (path / name).is_file()), None)
    if metadata is not None:
        table = read_file(metadata, spec.columns)
        usual = (("file_name", "label"),)
        names = chosen_columns(spec, table.column_names, usual, "columns of file names and labels")
        rows = enumerate(table[names[0]])
        return [_located(one, metadata, row, kind, spec) for row, one in rows], list(table[names[1]])
    files = [file for file in media_files(path) if file.suffix.lower() in kind.suffixes]
    stray = next((file for file in files if file.parent == path), None)
    if stray is not None:
        raise DataError(
            f"{stray} is in no folder of a class: give one folder a class, or metadata.csv with the columns file_name "
            f"and label"
        )
    classes: dict[str, list[Path]] = {}
    for file in files:
        classes.setdefault(file.parent.name, []).append(file)
    longest = max(map(len, classes.values()), default=0)
    mixed = [own[index] for index in range(longest) for own in classes.values() if index < len(own)]
    return [{"bytes": None, "path": str(file)} for file in mixed], [file.parent.name for file in mixed]


def _located(one: Any, table: Path | None, row: int, kind: Kind, spec: Source) -> dict[str, Any]:
    """A cell as bytes or path; names of files count from the table's folder."""
    if isinstance(one, dict) and (one.get("bytes") is not None or one.get("path")):
        return {"bytes": one.get("bytes"), "path": one.get("path")}
    if isinstance(one, bytes):
        return {"bytes": one, "path": None}
    if isinstance(one, str) and one:
        file = (Path() if table is None else table.parent) / one
        if not file.is_file():
            raise DataError(f"{title(spec)}, row {row + 1}: there is no file {file}")
        return {"bytes": None, "path": str(file)}
    raise DataError(f"{title(spec)}, row {row + 1}: expected one of {kind.name}, got {type(one).__name__}")
