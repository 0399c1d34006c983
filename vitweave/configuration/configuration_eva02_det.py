"""Config of the EVA-02 detector ViT: windowed and global blocks, rotary positions, gated MLP with a norm inside."""

from huggingface_hub.dataclasses import strict
from transformers.backbone_utils import BackboneConfigMixin

from vitweave.configuration.configuration_base import VitweaveConfig
from vitweave.configuration.reductions import as_pair


def resolve_window_blocks(blocks: str | list[int] | tuple[int, ...], num_layers: int) -> list[int]:
    """Explicit, sorted indices of the windowed blocks; "two_of_three" leaves every third block global: 2, 5, 8, ..."""
    if isinstance(blocks, str):
        if blocks != "two_of_three":
            raise ValueError(f"window_blocks must be 'two_of_three' or a list of block indices, got {blocks!r:.100}")
        return [index for index in range(num_layers) if index % 3 != 2]
    outside = [index for index in blocks if not 0 <= index < num_layers]
    if outside:
        raise ValueError(f"window_blocks has the block indices {outside}, expected 0 to {num_layers - 1}")
    return sorted(set(blocks))


@strict
class Eva02DetConfig(BackboneConfigMixin, VitweaveConfig):
    """The ViT of the EVA-02 detectors (arXiv:2303.11331), an encoder of EAGLE (arXiv:2408.15998).

    The defaults are EVA-02-L/16 as in `eva02_L_coco_det_sys_o365`. Patches only: no class token, no final norm.

    Args:
        intermediate_size: width of the gated MLP; None = hidden_size * 8 / 3, rounded down.
        image_size: pixels the model was trained at; it takes any size of at least one patch.
        pretrain_image_size: pixels behind the stored position table, which has one row per patch of such an image
            and one for the class token of pretraining. It is resampled to every image's grid.
        window_size: patches on each side of a window.
        window_blocks: blocks that attend inside windows, the others globally: "two_of_three" (every third is global)
            or indices from 0. Resolved once, when the config is made or the field is assigned.
        rope_theta: base of the rotary frequencies.
        rope_reference_size: patches per side that the rotary positions are stretched or squeezed to: patch p of n sits
            at p / n * rope_reference_size, on either axis, in windows (n = window_size) and globally (n = the grid).
        drop_path_rate: of the deepest block in training; it rises linearly from 0.
    """

    model_type = "eva02_det_vit"

    hidden_size: int = 1024
    num_hidden_layers: int = 24
    num_attention_heads: int = 16
    intermediate_size: int | None = None
    hidden_act: str = "silu"
    drop_path_rate: float | int = 0.0
    initializer_range: float | int = 0.02
    layer_norm_eps: float | int = 1e-6
    image_size: int | list[int] | tuple[int, int] = 1024
    pretrain_image_size: int | list[int] | tuple[int, int] = 224
    patch_size: int | list[int] | tuple[int, int] = 16
    num_channels: int = 3
    window_size: int = 16
    window_blocks: str | list[int] | tuple[int, ...] = "two_of_three"
    rope_theta: float | int = 10000.0
    rope_reference_size: int = 16

    _out_features: list[str] | None = None
    _out_indices: list[int] | None = None

    def __setattr__(self, name, value):
        if name == "window_blocks":
            value = resolve_window_blocks(value, self.num_hidden_layers)
        super().__setattr__(name, value)

    def __post_init__(self, **extra):
        chosen = {key: extra.pop(key, None) for key in ("out_features", "out_indices")}
        extra.pop("stage_names", None)  # always follows num_hidden_layers
        self.stage_names = ["stem", *(f"stage{index + 1}" for index in range(self.num_hidden_layers))]
        self.set_output_features_output_indices(**chosen)
        super().__post_init__(**extra)

    @property
    def mlp_width(self) -> int:
        """Hidden width of the MLP."""
        return int(self.hidden_size * 8 / 3) if self.intermediate_size is None else self.intermediate_size

    @property
    def stored_grid(self) -> tuple[int, int]:
        """Patches per column and row behind the position table."""
        (height, width), patch = as_pair(self.pretrain_image_size), as_pair(self.patch_size)
        return height // patch[0], width // patch[1]

    def validate_sizes(self):
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size={self.hidden_size} is not a multiple of num_attention_heads={self.num_attention_heads}"
            )
        head_size = self.hidden_size // self.num_attention_heads
        if head_size % 4:
            raise ValueError(
                "rotary positions on two axes need a head size (hidden_size / num_attention_heads) that 4 divides, got"
                f" {head_size}"
            )
        if min(self.stored_grid) < 1:
            raise ValueError(
                f"pretrain_image_size={self.pretrain_image_size} is smaller than one patch of {self.patch_size} pixels"
            )
        for name in ("window_size", "rope_reference_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} counts patches and must be at least 1, got {getattr(self, name)}")
