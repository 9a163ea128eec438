"""Where UMT5's tokenizer is: in a directory, or as bytes inside an encoder's file. No torch, and nothing is tokenised."""

from pathlib import Path

from utils.errors import UserError
from utils.safetensors_header import read_safetensors_header

TOKENIZER_FILES = ("tokenizer.json", "spiece.model")
SPIECE_FILE = "spiece.model"
# In files for ComfyUI the SentencePiece model travels with the encoder, under this name.
SPIECE_TENSOR = "spiece_model"


def has_tokenizer(place: Path) -> bool:
    """Whether a tokenizer is there: a directory with its files, or a `.safetensors` file that holds `spiece_model`."""
    if place.is_dir():
        return any((place / name).is_file() for name in TOKENIZER_FILES)
    if place.suffix != ".safetensors" or not place.is_file():
        return False
    try:
        return SPIECE_TENSOR in read_safetensors_header(place).shapes
    except UserError:
        return False  # whoever opens the encoder says what is wrong with it


def read_spiece(place: Path) -> bytes:
    """The SentencePiece model of a tokenizer.

    Args:
        place: a directory with `spiece.model`, or a `.safetensors` file that holds `spiece_model`.

    Raises:
        UserError: it is not there, or cannot be read.
    """
    try:
        if place.is_dir():
            return (place / SPIECE_FILE).read_bytes()
        span = read_safetensors_header(place).spans.get(SPIECE_TENSOR)
        if span is None:
            raise UserError(f"{place}: holds no {SPIECE_TENSOR}, so there is no tokenizer in it")
        with place.open("rb") as file:
            file.seek(span[0])
            return file.read(span[1] - span[0])
    except OSError as error:
        raise UserError(
            f"{place}: its {SPIECE_FILE} cannot be read ({error.strerror}); download google/umt5-xxl's tokenizer"
        ) from None
