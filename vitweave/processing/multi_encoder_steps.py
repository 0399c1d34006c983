"""What the torchvision and the PIL processor of encoder towers share: square padding or tiles, counts beside them."""

import numpy as np
from transformers.image_processing_utils import BatchFeature
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD, PILImageResampling, SizeDict
from transformers.processing_utils import ImagesKwargs
from transformers.utils import logging

from vitweave.processing.figure_steps import as_pair, check_value_range
from vitweave.processing.image_steps import PictureSteps, check_sides
from vitweave.processing.label_maps import check_canvas
from vitweave.processing.tiling import check_tile_pixels, choose_grid, tile_boxes, tile_count, tiling_options

logger = logging.get_logger(__name__)


class MultiEncoderImageProcessorKwargs(ImagesKwargs, total=False):
    """Options beyond those of every image processor.

    do_pad_square: pad to a square with the mean colour before resizing; None means yes unless `tiling` is on.
    tiling: None, or any of {"min_tiles": 1, "max_tiles": 12, "thumbnail": True}; tiles are as large as `size`.
    max_batch_tiles: a call that makes more tiles than this says so, with the memory they take.
    """

    do_pad_square: bool | None
    tiling: dict | None
    max_batch_tiles: int | None


def square_margins(height: int, width: int) -> tuple[int, int, int, int]:
    """What to add on top, bottom, left and right so that an image becomes a square with the image in its middle."""
    side = max(height, width)
    top, left = (side - height) // 2, (side - width) // 2
    return top, side - height - top, left, side - width - left


def check_tower_options(
    size, do_resize=True, do_pad_square=None, tiling=None, do_center_crop=None, do_pad=None, max_batch_tiles=1, **kwargs
) -> None:
    """Refuse options that contradict each other or would be accepted and ignored."""
    if size is None or not (size.height and size.width):
        raise ValueError(f"expected size as one number or {{'height': ..., 'width': ...}}, got {size}")
    check_sides("size", size)
    if do_center_crop or do_pad:
        raise ValueError("do_center_crop and do_pad are not supported here; use do_pad_square or tiling")
    options = tiling_options(tiling)
    if options is not None:
        check_tile_pixels(options["max_tiles"], size.height)
        if do_pad_square:
            raise ValueError("tiling stretches an image onto its grid of tiles; use do_pad_square=None or tiling=None")
        if do_resize is False or size.height != size.width:
            raise ValueError(
                f"tiling needs do_resize=True and square tiles, got do_resize={do_resize} and size "
                f"{size.height}x{size.width} (height x width)"
            )
    if max_batch_tiles is not None and max_batch_tiles < 1:
        raise ValueError(f"expected max_batch_tiles of at least 1, got {max_batch_tiles}")


def images_per_sample(images) -> list[int] | None:
    """How many images each sample of a nested list has; None where every image is a sample of its own."""
    if isinstance(images, (list, tuple)) and images and all(isinstance(one, (list, tuple)) for one in images):
        return [len(one) for one in images]
    return None


class MultiEncoderSteps(PictureSteps):
    """Images as towers of several encoders take them: padded to a square with the mean colour, or cut into tiles.

    Every tile is `size` large, and normalised once for the whole tower, which resizes and re-normalises for its
    encoders. A nested list is one list of images per sample, and the images of a sample share `max_tiles`.
    """

    size = {"height": 336, "width": 336}
    resample = PILImageResampling.BICUBIC
    image_mean = OPENAI_CLIP_MEAN
    image_std = OPENAI_CLIP_STD
    do_pad_square = None
    tiling = None
    max_batch_tiles = 256
    valid_kwargs = MultiEncoderImageProcessorKwargs
    model_input_names = ["pixel_values", "num_tiles", "image_sizes"]

    @classmethod
    def from_model_config(cls, config, **options):
        """The processor of a tower, from its `image_size`, `image_mean` and `image_std`."""
        height, width = as_pair(config.image_size)
        facts = {"size": {"height": height, "width": width}}
        facts |= {name: list(getattr(config, name)) for name in ("image_mean", "image_std") if getattr(config, name)}
        return cls(**facts | options)

    def _set_attributes(self, **kwargs) -> None:
        super()._set_attributes(**kwargs)
        check_tower_options(**{name: getattr(self, name, None) for name in self.valid_kwargs.__annotations__})

    def _validate_preprocess_kwargs(self, **kwargs) -> None:
        check_tower_options(**kwargs)
        super()._validate_preprocess_kwargs(**kwargs)

    def preprocess(self, images, **kwargs) -> BatchFeature:
        """Prepare images, or one list of images per sample.

        Returns:
            `pixel_values` (tiles of all images, channels, height, width), `num_tiles` (images,), and `image_sizes`
            (images, 2), the (height, width) that an image came with.
        """
        return super().preprocess(images, **kwargs)

    def _preprocess_image_like_inputs(
        self, images, do_convert_rgb, input_data_format, return_tensors, device=None, **kwargs
    ) -> BatchFeature:
        mean = kwargs["image_mean"]
        channels = len(mean) if kwargs["do_normalize"] and isinstance(mean, (list, tuple)) else None
        counts = images_per_sample(images)
        images = self._prepare_image_like_inputs(
            images, do_convert_rgb=do_convert_rgb, input_data_format=input_data_format, device=device, channels=channels
        )
        if not images:
            raise ValueError("expected at least one image, got none")
        counts = counts if counts is not None and sum(counts) == len(images) else [1] * len(images)
        shares = [count for count in counts for _ in range(count)]
        sizes = [tuple(image.shape[-2:]) for image in images]
        self._report_tiles(sizes, shares, **kwargs)
        pictures = [self._pictures(image, share, **kwargs) for image, share in zip(images, shares, strict=True)]
        data = {
            "pixel_values": [self.to_pixel_values(one, **kwargs) for listed in pictures for one in listed],
            "num_tiles": [len(listed) for listed in pictures],
            "image_sizes": [list(size) for size in sizes],
        }
        return BatchFeature(data=data, tensor_type=return_tensors)

    def process_image(self, image, *args, **kwargs):
        """A picture as (channels, height, width); one without pixels is refused."""
        image = super().process_image(image, *args, **kwargs)
        if 0 in image.shape:
            raise ValueError(f"expected an image with at least one pixel, got {tuple(image.shape)} (channels first)")
        check_value_range(image)
        return image

    def count_tiles(self, height: int, width: int, images_in_sample: int = 1, tiling: dict | None = None) -> int:
        """How many tiles an image of this size becomes; `tiling` None means this processor's."""
        options = tiling_options(self.tiling if tiling is None else tiling)
        if options is None:
            return 1
        options["max_tiles"] //= images_in_sample
        return tile_count(width, height, self.size.height, **options)

    def _report_tiles(self, sizes, shares, size: SizeDict, tiling, max_batch_tiles, **kwargs) -> None:
        """Say how many tiles a batch makes where they are many."""
        if tiling is None or max_batch_tiles is None:
            return
        most = tiling_options(tiling)
        tiles = 0
        for (height, width), share in zip(sizes, shares, strict=True):
            grid = most | {"max_tiles": most["max_tiles"] // share}
            tiles += tile_count(width, height, size.height, **grid)
        if tiles > max_batch_tiles:
            mebibytes = tiles * 3 * size.height * size.width * 4 / 2**20
            logger.warning(
                f"{len(sizes)} images make {tiles} tiles of {size.height}x{size.width} ({mebibytes:.0f} MiB of pixel "
                f"values), more than max_batch_tiles={max_batch_tiles}; lower max_tiles={most['max_tiles']} or the "
                "batch size, or raise max_batch_tiles"
            )

    def _pictures(self, image, images_in_sample: int, size: SizeDict, tiling, do_pad_square, do_resize, **kwargs):
        """The tiles of one image, thumbnail last, or the image alone; not normalised yet."""
        resample = kwargs["resample"]
        options = tiling_options(tiling)
        if options is None:
            if do_pad_square is not False:
                check_canvas((max(image.shape[-2:]),) * 2, tuple(image.shape[-2:]))
                image = self.pad_edges(image, square_margins(*image.shape[-2:]), self._mean_colour(image, **kwargs))
            return [self._fit(image, size, do_resize, resample)]
        side, (height, width) = size.height, image.shape[-2:]
        columns, rows = choose_grid(width, height, side, options["min_tiles"], options["max_tiles"] // images_in_sample)
        filled = self._fit(image, SizeDict(height=rows * side, width=columns * side), True, resample)
        boxes = tile_boxes(columns, rows, side)
        tiles = [filled[:, top:bottom, left:right] for left, top, right, bottom in boxes]
        if options["thumbnail"] and len(tiles) > 1:
            tiles.append(self._fit(image, size, True, resample))
        return tiles

    def _fit(self, image, size: SizeDict, do_resize: bool, resample):
        """The image at a size; it already has it where `do_resize` is off."""
        if tuple(image.shape[-2:]) == (size.height, size.width):
            return image
        if not do_resize:
            raise ValueError(
                f"do_resize=False: expected images of {size.height}x{size.width} (after square padding where it is "
                f"on), got {image.shape[-2]}x{image.shape[-1]} (height x width)"
            )
        return self.resize(image, size, resample)

    def _mean_colour(self, image, image_mean, do_rescale, **kwargs):
        """`image_mean` as an image (channels, 1, 1) in the units of `image`, cut to whole grey levels as LLaVA does."""
        mean = np.broadcast_to(np.asarray(image_mean, dtype=np.float64), (image.shape[0],))
        colour = np.floor(mean * 255)
        if not do_rescale and "float" in str(image.dtype):
            colour = colour / 255  # floats that are not rescaled span 0 to 1 already
        pixel = image[:, :1, :1] * 0
        for channel, value in enumerate(colour):
            pixel[channel] = value
        return pixel
