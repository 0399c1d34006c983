"""Config of the models that predict one value or class per pixel: a backbone and a head."""

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig

from vitweave.configuration.configuration_base import VitweaveConfig
from vitweave.configuration.encoder_configs import resolve_config


@strict
class DensePredictorConfig(VitweaveConfig):
    """A backbone whose feature maps go through a head to one prediction per pixel.

    Args:
        backbone_config: any registered backbone; its `out_features` / `out_indices` choose the maps. None is a
            specialised ViT of base size.
        freeze_backbone: train the head alone; the backbone's weights, dropout and statistics stand still. It is saved:
            a reloaded or resumed model stays frozen.
        head_type: of a segmentation model "linear", "mlp" or "subpixel", of a depth model "linear", "dpt" or
            "regression", see `vitweave/modeling/heads/registry.py`.
        head_options: arguments of that head's constructor.
        losses: name of a loss -> its weight in the sum, see `vitweave/modeling/losses.py` and `depth_losses.py`. None
            is cross-entropy for segmentation, "sig" for depth in metres, "scale_shift_invariant" for disparity.
        loss_options: name of a loss -> its constructor's arguments.
        class_weights: segmentation: how much each class counts in every loss, one number per label; None counts them
            equally.
        ignore_index: segmentation: label of the pixels that count nowhere.
        depth_target: what a depth model predicts: "metres", or "disparity", relative inverse depth.
        min_depth, max_depth: in metres, the range of a depth model's predictions in metres.
    """

    model_type = "dense_predictor"
    sub_configs = {"backbone_config": AutoConfig}  # the form that works from transformers 5.13 to the newest

    backbone_config: dict | PreTrainedConfig | None = None
    freeze_backbone: bool = False
    head_type: str = "linear"
    head_options: dict | None = None
    losses: dict[str, float | int] | None = None
    loss_options: dict[str, dict] | None = None
    class_weights: list[float | int] | tuple[float | int, ...] | None = None
    ignore_index: int = 255
    depth_target: str = "metres"
    min_depth: float | int = 0.001
    max_depth: float | int = 10.0

    def __post_init__(self, **extra):
        self.backbone_config = resolve_config(
            self.backbone_config or {"model_type": "specialized_vit"}, saved_by=self.transformers_version
        )
        super().__post_init__(**extra)
