"""Replays of the tiling vectors: which grid an image gets, and the pixels of its tiles."""

import numpy as np
import PIL.Image
import torch

from vitweave.processing.image_processing_pil_multi_encoder import MultiEncoderImageProcessorPil
from vitweave.processing.tiling import candidate_grids, choose_grid, dynamic_tiles, tile_boxes, tile_count


def replay_dynamic_tiling_table(case):
    for setting in case.sidecar["settings"]:
        side, limits = setting["image_size"], (setting["min_num"], setting["max_num"])
        assert [list(grid) for grid in candidate_grids(*limits)] == setting["candidate_order_cols_rows"]
        assert setting["rows"]
        for row in setting["rows"]:
            size = (row["width"], row["height"])
            columns, rows = choose_grid(*size, side, *limits)
            boxes = tile_boxes(columns, rows, side)
            count = tile_count(*size, side, *limits, thumbnail=setting["use_thumbnail"])
            found = {"grid_cols_rows": [columns, rows], "tiles": len(boxes), "total_images": count}
            found["boxes_left_top_right_bottom"] = [list(box) for box in boxes]
            found["resized_to"] = list(boxes[-1][2:])
            found["thumbnail"] = count > len(boxes)
            assert found == {name: row[name] for name in found}, size


def replay_dynamic_tiling_pixels(case):
    facts = case.sidecar
    options = {"max_tiles": facts["max_num"], "thumbnail": facts["use_thumbnail"]}
    processor = MultiEncoderImageProcessorPil(
        size=facts["image_size"], tiling=options, do_rescale=False, do_normalize=False
    )
    assert facts["cases"]
    for index in range(len(facts["cases"])):
        image = case.tensors[f"input.image_{index}_hwc"].numpy()
        expected = case.tensors[f"output.tiles_{index}_nhwc"].int()
        picture = PIL.Image.fromarray(image)
        tiles = torch.from_numpy(np.stack(dynamic_tiles(picture, facts["image_size"], **options))).int()
        assert tiles.shape == expected.shape and (tiles - expected).abs().max() <= facts["tolerance"]["atol"]
        for given in (picture, image):
            processed = processor(given, input_data_format="channels_last", return_tensors="pt")["pixel_values"]
            assert torch.equal(processed.permute(0, 2, 3, 1).int(), tiles)


KINDS = {
    "dynamic_tiling_pixels": replay_dynamic_tiling_pixels,
    "dynamic_tiling_table": replay_dynamic_tiling_table,
}
