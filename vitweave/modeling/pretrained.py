"""The safe base class of every vitweave model."""

from transformers import PreTrainedModel


class VitweavePreTrainedModel(PreTrainedModel):
    """A `PreTrainedModel` that closes the holes of transformers that hit vision composites."""

    main_input_name = "pixel_values"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
