"""Config of several aligned sensors that share an encoder and fuse inside its blocks."""

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig
from transformers.backbone_utils import BackboneConfigMixin

from vitweave.configuration.configuration_base import VitweaveConfig
from vitweave.configuration.encoder_configs import resolve_config
from vitweave.configuration.encoder_facts import encoder_facts, vision_part

STREAMS = {"segformer": "mit", "swin": "swin"}  # any other type is a plain ViT
STAGE_LISTS = {
    "mit": ("hidden_sizes", "depths", "num_attention_heads", "sr_ratios", "patch_sizes", "strides", "mlp_ratios"),
    "swin": ("depths", "num_heads"),
}
CHOICES = {"auxiliary": ("pairwise", "max"), "ensemble": ("trained", "mean"), "merge": ("mean", "concat")}


@strict
class ModalityFusionConfig(BackboneConfigMixin, VitweaveConfig):
    """Aligned streams of M modalities through one encoder with a norm per modality and fusions in its blocks.

    Args:
        modalities: names in order, e.g. ["rgb", "depth"]; the first is the main one.
        stream_config: the encoder: a SegFormer (MiT), a Swin, or any plain ViT; None is MiT-B0. Its heads are not used.
        fusion_type: see `vitweave/modeling/modality_fusion/registry.py`; None runs the streams side by side.
        fusion_options: arguments of that fusion's constructor.
        fusion_blocks: how many of the last blocks fuse, or a list with how many of the last ones of every stage; None
            is all, of an image-to-image model the last one of every stage.
        auxiliary: of more than two modalities: "pairwise" keeps every stream, "max" merges all but the first at the
            start of every stage (GeminiFusion on DeLiVER).
        stage_layers: of a ViT, the blocks that end a stage; None is the ends of its four quarters.
        shared_weights: False gives every modality of a MiT an encoder of its own (CMX), not only norms.
        layer_norm_eps: of the norms per modality.
        conv_norm_eps: of those behind a MiT's strided convolutions, which embed patches and reduce keys and values;
            None is `layer_norm_eps` (GeminiFusion, TokenFusion), NVIDIA's SegFormer and CMX have 1e-5.
        drop_path_rate: of the last block, rising from 0.
        modality_dropout: probability in training that a modality of an image is left out; at least one stays.
        penalty_weight: of what the fusion asks to be added to the loss.
        reconstruction_weight: of the mean absolute error in the loss of an image-to-image model.
        decoder_hidden_size, decoder_dropout: of the MLP decoder over the stages; the former is also the width of the
            neck with which an image-to-image model draws over a Swin or a ViT.
        decoder_frozen_norm: the decoder's batch norm keeps its statistics, mean 0 and variance 1 at the start.
        decoder_options: further arguments of `MlpHead`, or of the `DptNeck` of such an image-to-image model.
        ensemble: how the logits of the modalities are averaged: by "trained" weights, or their "mean".
        merge: of a backbone, how the maps of the streams become one: "mean", or "concat" along the channels.
        losses: name of a loss -> its weight in the sum, see `vitweave/modeling/losses.py`; None is cross-entropy.
        loss_options: name of a loss -> its constructor's arguments.
        class_weights: how much each class counts in every loss, one number per label; None counts them equally.
        semantic_loss_ignore_index: label that does not count.
    """

    model_type = "modality_fusion_vision"
    keys_to_ignore_at_inference = ["hidden_states", "modality_logits", "modality_reconstructions", "penalty"]
    sub_configs = {"stream_config": AutoConfig}  # the form that works from transformers 5.13 to the newest

    modalities: list[str] | tuple[str, ...] = ("rgb", "depth")
    stream_config: dict | PreTrainedConfig | None = None
    fusion_type: str | None = "gemini"
    fusion_options: dict | None = None
    fusion_blocks: int | list[int] | tuple[int, ...] | None = None
    auxiliary: str = "pairwise"
    stage_layers: list[int] | tuple[int, ...] | None = None
    shared_weights: bool = True
    layer_norm_eps: float = 1e-6
    conv_norm_eps: float | None = None
    drop_path_rate: float | int = 0.0
    modality_dropout: float | int = 0.0
    penalty_weight: float | int = 1e-6
    reconstruction_weight: float | int = 100.0
    decoder_hidden_size: int = 256
    decoder_dropout: float | int = 0.1
    decoder_frozen_norm: bool = False
    decoder_options: dict | None = None
    ensemble: str = "trained"
    merge: str = "mean"
    losses: dict[str, float | int] | None = None
    loss_options: dict[str, dict] | None = None
    class_weights: list[float | int] | tuple[float | int, ...] | None = None
    semantic_loss_ignore_index: int = 255
    initializer_range: float = 0.02
    _out_features: list[str] | None = None
    _out_indices: list[int] | None = None

    def __post_init__(self, **extra):
        self.modalities = list(self.modalities)
        stream = resolve_config(
            self.stream_config or {"model_type": "segformer"}, "stream_config", self.transformers_version
        )
        self.stream_config = vision_part(stream)
        facts = encoder_facts(self.stream_config)
        if self.stream == "vit":
            quarters = [round(part * facts.num_layers / 4) for part in range(1, 5)]
            layers = quarters if self.stage_layers is None else self.stage_layers
            self.stage_layers = sorted(facts.resolve_layers(sorted({max(1, layer) for layer in layers})))
            num_stages = len(self.stage_layers)
        else:
            num_stages = facts.num_layers
        self.stage_names = [f"stage{index + 1}" for index in range(num_stages)]
        extra.pop("stage_names", None)
        features, indices = extra.pop("out_features", None), extra.pop("out_indices", None)
        if features is None and indices is None:
            features = self.stage_names
        self.set_output_features_output_indices(features, indices)
        super().__post_init__(**extra)

    def validate_modalities(self):
        """Refuse fewer than one modality, one named twice, and unknown choices."""
        if not self.modalities or len(set(self.modalities)) != len(self.modalities):
            raise ValueError(f"expected the names of one or more different modalities, got {self.modalities}")
        for option, known in CHOICES.items():
            if getattr(self, option) not in known:
                raise ValueError(f"expected {option} to be one of {list(known)}, got {getattr(self, option)!r}")
        if not 0 <= self.modality_dropout < 1:
            raise ValueError(f"expected modality_dropout in [0, 1), got {self.modality_dropout}")
        if self.stream != "vit" and self.stage_layers is not None:
            raise ValueError(f"stage_layers belong to a plain ViT, got them with a {self.stream_config.model_type!r}")
        if self.stream != "mit" and (not self.shared_weights or self.conv_norm_eps is not None):
            raise ValueError(
                "shared_weights=False and conv_norm_eps belong to a MiT, got them with a"
                f" {self.stream_config.model_type!r}"
            )

    def validate_stages(self):
        """Refuse a hierarchical encoder whose lists are not all as long as it has stages, or whose heads do not fit."""
        if self.stream == "vit":
            return
        encoder, lists = self.stream_config, STAGE_LISTS[self.stream]
        lengths = {name: len(getattr(encoder, name)) for name in lists}
        if len(set(lengths.values())) > 1:
            raise ValueError(f"expected one entry per stage in {list(lists)} of the stream_config, got {lengths}")
        facts = encoder_facts(encoder)
        heads = encoder.num_heads if self.stream == "swin" else encoder.num_attention_heads
        misfits = [(width, count) for width, count in zip(facts.hidden_sizes[1:], heads, strict=True) if width % count]
        if misfits:
            raise ValueError(f"expected heads that divide the channels of their stage, got (channels, heads) {misfits}")

    @property
    def stream(self) -> str:
        """Which kind of encoder: "mit", "swin" or "vit"."""
        return STREAMS.get(self.stream_config.model_type, "vit")

    @property
    def num_modalities(self) -> int:
        """How many there are."""
        return len(self.modalities)

    @property
    def num_streams(self) -> int:
        """How many streams the blocks see."""
        return 2 if self.auxiliary == "max" and self.num_modalities > 2 else self.num_modalities

    @property
    def num_channels(self) -> int:
        """Of every modality's image; sensors with one channel are repeated."""
        return encoder_facts(self.stream_config).num_channels
