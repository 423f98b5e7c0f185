"""What a user should know about a set of images before training on it."""

from collections.abc import Iterable, Sequence
from logging import getLogger
from statistics import median

from src.data.folder_index import Listing, printable
from src.data.image_index import Record

log = getLogger(__name__)

LARGE_CROP = 0.25
"""Share of an image's area."""
DARK = 1 / 8
"""Share of white."""


def some(names: Iterable[str]) -> str:
    """The first five of a list of names, and the number of the others."""
    names = [printable(name) for name in names]
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def report_faults(faults: list[str], count: int) -> None:
    """Logs the images that are not used because of a fault, of `count` images."""
    if faults:
        log.warning("left out %d of %d images that cannot be used:", len(faults), count)
        for fault in faults:
            log.warning("  %s", printable(fault))


def report_others(where: str, listing: Listing) -> None:
    """Logs the files that are not used: those of other kinds, repeated links."""
    if listing.others:
        kinds = ", ".join(f"{n} {kind or 'without extension'}" for kind, n in listing.others.most_common(5))
        log.info("%s: left out %d other files (%s)", where, listing.others.total(), printable(kinds))
    if listing.repeated:
        log.warning("%s: left out %d links to files that it holds anyway", where, listing.repeated)


def report_sizes(
    where: str, images: dict[str, Record], image_size: int | Sequence[int], image_shape: tuple[int, int, int]
) -> None:
    """Warns of images that are enlarged, and of a crop that drops much of most images."""
    _, height, width = image_shape
    enlarged = [
        f"{path} ({record.width}x{record.height})"
        for path, record in images.items()
        if record.width < width or record.height < height
    ]
    if enlarged:
        log.warning(
            "%d of %d images are smaller than data.image_size=%s and are enlarged: %s; "
            "data.min_size=%d with data.on_error=skip leaves them out",
            *(len(enlarged), len(images), image_size, some(enlarged), max(height, width)),
        )
    # An image's aspect ratio over that of image_size, or the inverse, is the share that remains.
    ratios = [record.width * height / (record.height * width) for record in images.values()]
    crop = median(1 - min(ratio, 1 / ratio) for ratio in ratios)
    if crop > LARGE_CROP:
        tall, wide = (median(getattr(r, side) for r in images.values()) for side in ("height", "width"))
        scale = min(height, width) / min(tall, wide)
        log.warning(
            "%s: the crop to data.image_size=%s drops %.0f %% or more of the area of half of the images; "
            "their typical size of %dx%d (width x height) suggests data.image_size=[%d,%d] (height, width)",
            *(where, image_size, 100 * crop, wide, tall),
            *(max(8, round(side * scale / 8) * 8) for side in (tall, wide)),
        )


def report_content(where: str, images: dict[str, Record]) -> None:
    """Warns of frames that are not used, and of images with many bits that are nearly black."""
    stacks = {path: record.frames for path, record in images.items() if record.frames > 1}
    if stacks:
        log.warning(
            "%s: of %d files with several frames only the first is used, %d frames are left out: %s",
            *(where, len(stacks), sum(stacks.values()) - len(stacks), some(stacks)),
        )
    deep = [record.brightest for record in images.values() if record.brightest is not None]
    if deep and max(deep) < 255 * DARK:
        log.warning(
            "%s: nothing in its %d images with more than 8 bits per channel is brighter than %.1f %% of white: "
            "set data.white to their value of white, e.g. data.white=4095 for 12 bits",
            *(where, len(deep), 100 * max(deep) / 255),
        )


def report_classes(where: str, names: list[str]) -> None:
    """Logs which label is which folder; warns if names that are numbers are not in the order of numbers."""
    shown = ", ".join(f"{label} = {name}" for label, name in enumerate(names[:20]))
    more = f" and {len(names) - 20} more" if len(names) > 20 else ""
    log.info("data        %d classes: %s%s", len(names), shown, more)
    if not all(name.isdecimal() for name in names):
        return
    moved = [label for label, name in enumerate(sorted(names, key=int)) if name != names[label]]
    if moved:
        log.warning(
            "%s: class folders are in the order of text, so label %d is folder %s; "
            "rename them with leading zeros (02) for the order of numbers",
            *(where, moved[0], names[moved[0]]),
        )
