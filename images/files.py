"""Image files: which files of a folder are read as images, and the one rule by which their pixels become 8-bit RGB.

    paths, left_out = list_images(Path("train/cat"))
    image = read_rgb("photo.tif")                        # a Pillow image of mode RGB

Training, evaluation and everything else that reads image files does it here:

    orientation       images are turned and mirrored as their EXIF data say
    8 bits a channel  stay as they are; grey becomes three equal channels, palettes and CMYK become their colours
    16 bits           keep the higher 8 bits
    32-bit integers   0..255 stay as they are; up to 65,535 keep the higher 8 of 16 bits; numbers that fill 32 bits
                      keep the highest 8. What lies between is refused, for it would be black
    floats            0..1 stand for 0..255. Larger ones stand for themselves up to 255, and for 16 bits up to 65,535
    alpha             the image lies on white, or on black where all of it would be nearly white on white. Where
                      alpha is the same everywhere, it says nothing and is dropped
    several frames    the first one

The range of 32-bit numbers is found for each image alone: files give no other hint. Values below 0, and numbers that
are not finite, are refused. A refusal is a ValueError; whoever reads many files names the file and goes on.
"""

import os
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from PIL.Image import Image

EXTENSIONS = (
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".dib", ".webp", ".ppm", ".pgm", ".pbm", ".pnm", ".tif", ".tiff",
    ".gif", ".avif", ".jp2", ".tga",
)  # fmt: skip

EXCESS = 0.05  # of a range of floats: so far filters overshoot, which is clipped
NEARLY_WHITE = 240
TURNS = {
    2: "FLIP_LEFT_RIGHT", 3: "ROTATE_180", 4: "FLIP_TOP_BOTTOM", 5: "TRANSPOSE", 6: "ROTATE_270", 7: "TRANSVERSE",
    8: "ROTATE_90",
}  # fmt: skip
EXIF_ORIENTATION, TIFF_SAMPLE_FORMAT = 0x0112, 339


def list_images(folder: str | os.PathLike) -> tuple[list[str], dict[str, list[str]]]:
    """The images in a folder and in its sub-folders, links followed: relative paths, sorted; and the files that are
    left out, by reason (an ending such as ".heic", "not a regular file").

    A link that leads nowhere is listed as what its name says, so that it is reported when its image is wanted. Names
    that begin with a dot, such as ._name.jpg of macOS, are neither listed nor left out.
    """
    images: list[str] = []
    left_out: dict[str, list[str]] = {}
    seen = {os.path.realpath(folder)}  # a link may lead back
    waiting = [""]
    while waiting:
        below = waiting.pop()
        with os.scandir(os.path.join(folder, below)) as entries:
            for entry in entries:
                path = f"{below}/{entry.name}" if below else entry.name
                if entry.name.startswith("."):
                    continue
                if entry.is_dir():
                    if (real := os.path.realpath(entry.path)) not in seen:
                        seen.add(real)
                        waiting.append(path)
                elif not entry.name.lower().endswith(EXTENSIONS):
                    ending = os.path.splitext(entry.name)[1].lower()
                    left_out.setdefault(ending or "without an ending", []).append(path)
                elif entry.is_file() or not os.path.exists(entry.path):
                    images.append(path)
                else:
                    left_out.setdefault("not a regular file", []).append(path)
    return sorted(images), {reason: sorted(paths) for reason, paths in sorted(left_out.items())}


def read_rgb(path: str | Path) -> "Image":
    """The file as a Pillow image of three 8-bit channels, oriented; see above.

    Raises what Pillow's decoders do (mostly OSError, SyntaxError and ValueError) where the file is damaged, and
    ValueError where its numbers have no meaning as pixels.
    """
    from PIL import Image

    with Image.open(path) as image:
        if image.format == "TIFF":  # which Pillow turns itself; uncompressed ones wrongly when it maps them into memory
            image.filename = ""
        image.load()
        turn = TURNS.get(image.getexif().get(EXIF_ORIENTATION))
        if image.mode.startswith("I") or image.mode == "F":
            image = Image.fromarray(_eight_bits(image))
        image = _opaque(image)
        return image.transpose(Image.Transpose[turn]) if turn else image


def _eight_bits(image: "Image") -> np.ndarray:
    """Grey of more than 8 bits to uint8 [H, W]."""
    values = np.asarray(image)
    if image.mode == "F":
        return _of_floats(values)
    if image.mode != "I" or image.format in ("PNG", "PPM"):  # 16 bits
        return (values.clip(0, 65535) >> 8).astype(np.uint8)
    if image.format == "TIFF" and 2 not in image.tag_v2.get(TIFF_SAMPLE_FORMAT, ()):
        values = values.view(np.uint32)  # Pillow takes all for signed ones
    if (lowest := values.min()) < 0:
        raise ValueError(f"its values reach from {lowest} to {values.max()}: what is black is not known")
    highest, bits = int(values.max()), np.iinfo(values.dtype).bits - (values.dtype.kind == "i")
    if highest < 2**16:
        return (values >> (8 if highest > 255 else 0)).astype(np.uint8)
    if highest < 2 ** (bits - 8):
        raise ValueError(f"its 32-bit values end at {highest}: what is white is not known")
    return (values >> (bits - 8)).astype(np.uint8)


def _of_floats(values: np.ndarray) -> np.ndarray:
    if not np.isfinite(values).all():
        raise ValueError("it holds values that are not finite")
    lowest, highest = float(values.min()), float(values.max())
    top = next((top for top in (1, 255, 65535) if highest <= top * (1 + EXCESS)), None)
    if top is None or lowest < -top * EXCESS:
        unknown = "white" if top is None else "black"
        raise ValueError(f"its values reach from {lowest:g} to {highest:g}: what is {unknown} is not known")
    return np.rint(values.clip(0, top) * (255 / top)).astype(np.uint8)


def _opaque(image: "Image") -> "Image":
    """In RGB, without alpha."""
    from PIL import Image

    if "transparency" not in image.info and not {"A", "a"} & {*image.getbands()}:
        return image.convert("RGB")
    shape = image.convert("RGBA")
    low, high = shape.getchannel("A").getextrema()
    if low == high:
        return shape.convert("RGB")
    for background in ("white", "black"):
        seen = Image.alpha_composite(Image.new("RGBA", shape.size, background), shape).convert("RGB")
        if min(darkest for darkest, _ in seen.getextrema()) < NEARLY_WHITE:
            return seen
    return seen
