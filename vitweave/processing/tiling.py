"""Dynamic tiling of LEO (arXiv:2501.06986) and InternVL (arXiv:2404.16821): tiles in a grid of the image's shape."""

from functools import lru_cache

import PIL.Image

from vitweave.processing.image_steps import picture_to_rgb

MAX_TILES = 256  # of one image; released models take 40 at most
MAX_TILE_PIXELS = 2**26  # of one image: 256 tiles of 512x512
TILING_DEFAULTS = {"min_tiles": 1, "max_tiles": 12, "thumbnail": True}


@lru_cache(maxsize=64)
def candidate_grids(min_tiles: int, max_tiles: int) -> tuple[tuple[int, int], ...]:
    """Every (columns, rows) of `min_tiles` to `max_tiles` tiles, the fewest first.

    The official code takes grids of equally many tiles in the order in which a set yields them. It matters only where
    two of them are equally far from the image's shape (4 tiles exactly, at 5:2); the same set is built here for that.
    """
    grids = {
        (columns, rows)
        for longest in range(min_tiles, max_tiles + 1)
        for columns in range(1, longest + 1)
        for rows in range(1, min(longest, max_tiles // columns) + 1)
        if columns * rows >= min_tiles
    }
    return tuple(sorted(grids, key=lambda grid: grid[0] * grid[1]))


def check_tiles(min_tiles: int, max_tiles: int) -> None:
    """Refuse tile counts that no image can have, or that no memory can hold."""
    whole = all(isinstance(count, int) and not isinstance(count, bool) for count in (min_tiles, max_tiles))
    if not whole or not 1 <= min_tiles <= max_tiles:
        raise ValueError(
            f"expected whole numbers 1 <= min_tiles <= max_tiles, got min_tiles={min_tiles!r:.50} and"
            f" max_tiles={max_tiles!r:.50}"
        )
    if max_tiles > MAX_TILES:
        raise ValueError(f"expected max_tiles of at most {MAX_TILES}, got {max_tiles}; released models use 6 to 40")


def check_tile_pixels(max_tiles: int, tile_size: int) -> None:
    """Refuse tiles that together are larger than any image of a model; their pixels are all made at once."""
    if max_tiles * tile_size**2 > MAX_TILE_PIXELS:
        raise ValueError(
            f"expected at most {MAX_TILE_PIXELS} pixels in all tiles, got {max_tiles} tiles of {tile_size}x{tile_size};"
            " lower max_tiles or the size"
        )


def tiling_options(tiling: dict | None) -> dict | None:
    """The options with their defaults filled in, None for no tiling; unknown names are refused."""
    if tiling is None:
        return None
    if not isinstance(tiling, dict):
        raise ValueError(f"expected tiling as a mapping of options or None, got {tiling!r:.100}")
    unknown = sorted(set(map(str, tiling)) - set(TILING_DEFAULTS))
    if unknown:
        raise ValueError(f"unknown tiling options {unknown}; known: {sorted(TILING_DEFAULTS)}")
    options = TILING_DEFAULTS | tiling
    check_tiles(options["min_tiles"], options["max_tiles"])
    return options


def choose_grid(width: int, height: int, tile_size: int, min_tiles: int = 1, max_tiles: int = 12) -> tuple[int, int]:
    """The grid whose shape is nearest to the image's: (columns, rows).

    Of grids equally near, the one with more tiles wins only if the image has more than half of that grid's pixels: a
    448x448 image stays one tile. Where no grid has `min_tiles` to `max_tiles` tiles (a share of 0), it is one tile.

    Args:
        width, height: of the image in pixels.
        tile_size: side of a tile in pixels.
    """
    if min(width, height, tile_size) < 1 or min_tiles < 1 or max_tiles < 0:
        raise ValueError(
            f"expected an image and tiles of at least one pixel and min_tiles >= 1, got {width}x{height} (width x "
            f"height), tile_size={tile_size}, min_tiles={min_tiles}, max_tiles={max_tiles}"
        )
    if max_tiles > MAX_TILES:
        check_tiles(min_tiles, max_tiles)
    best, nearest = (1, 1), float("inf")
    for columns, rows in candidate_grids(min_tiles, max_tiles):
        distance = abs(width / height - columns / rows)
        large = width * height > 0.5 * tile_size * tile_size * columns * rows
        if distance < nearest or (distance == nearest and large):
            best, nearest = (columns, rows), distance
    return best


def tile_boxes(columns: int, rows: int, tile_size: int) -> list[tuple[int, int, int, int]]:
    """The tiles of a grid row by row: (left, top, right, bottom) in pixels of the image resized to the grid."""
    lefts, tops = range(0, columns * tile_size, tile_size), range(0, rows * tile_size, tile_size)
    return [(left, top, left + tile_size, top + tile_size) for top in tops for left in lefts]


def tile_count(
    width: int, height: int, tile_size: int, min_tiles: int = 1, max_tiles: int = 12, thumbnail: bool = True
) -> int:
    """How many pictures tiling makes of an image; the thumbnail is only added to two tiles or more."""
    columns, rows = choose_grid(width, height, tile_size, min_tiles, max_tiles)
    return columns * rows + int(thumbnail and columns * rows > 1)


def dynamic_tiles(
    image: PIL.Image.Image,
    tile_size: int,
    min_tiles: int = 1,
    max_tiles: int = 12,
    thumbnail: bool = True,
    images_in_sample: int = 1,
) -> list[PIL.Image.Image]:
    """An image stretched to its grid and cut, the whole image as a last tile: what released models were trained on.

    Args:
        image: any 8-bit PIL picture.
        images_in_sample: that many images share `max_tiles`.
    """
    image = picture_to_rgb(image)
    grid = choose_grid(*image.size, tile_size, min_tiles, max_tiles // images_in_sample)
    filled = image.resize((grid[0] * tile_size, grid[1] * tile_size), PIL.Image.Resampling.BICUBIC)
    tiles = [filled.crop(box) for box in tile_boxes(*grid, tile_size)]
    if thumbnail and len(tiles) > 1:
        tiles.append(image.resize((tile_size, tile_size), PIL.Image.Resampling.BICUBIC))
    return tiles
