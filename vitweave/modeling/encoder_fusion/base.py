"""What the encoder fusions share: their input, and the plan of their output."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from torch import Tensor, nn

from vitweave.configuration.encoder_fusion_plans import FusionPlan, Grid


@dataclass
class EncoderMaps:
    """What several encoders say about the same images, one entry per encoder.

    Args:
        maps: (batch, channels_k, height_k, width_k); of an encoder that sees crops (batch, views, channels_k, height_k,
            width_k), the view of the whole image first where there is one, then the crops row by row.
        prefixes: (batch, class tokens and registers, channels_k) where the encoder keeps them, else None.
        image_sizes: (batch, 2), int64, (height, width) of the image before it was padded to a square, at the centre;
            None where nothing was padded.
    """

    maps: list[Tensor]
    prefixes: list[Tensor | None] = field(default_factory=list)
    image_sizes: Tensor | None = None


class EncoderFusion(nn.Module):
    """Maps of several encoders to one token sequence.

    A fusion takes `(in_channels, grids, hidden_size, **its own options)`; `in_channels` and `grids` have one entry
    per encoder and `hidden_size` is the width of its output, None for the one that follows from its input. It maps
    `EncoderMaps` to tokens (batch, tokens, hidden). What comes out is known beforehand: `plan`.

    Start values are set in `set_start_values()`, as `VitweavePreTrainedModel` describes it.

    Args:
        plan_for: from the grids of all encoders to the plan of the output; grids may differ from image to image size.
        grids: at the configured image sizes.
    """

    takes_prefixes = False  # reads `EncoderMaps.prefixes`
    takes_views = False  # reads maps of several views of an image
    injects = False  # acts between the blocks of the first encoder, too

    def __init__(self, plan_for: Callable[[Sequence[Grid]], FusionPlan], grids: Sequence[Grid]):
        super().__init__()
        self.plan_for = plan_for
        self.plan = plan_for(grids)

    @property
    def hidden_size(self) -> int:
        """Channels of the tokens."""
        return self.plan.hidden_size

    @property
    def num_tokens(self) -> int:
        """Tokens of an image of the configured size."""
        return self.plan.num_tokens

    @property
    def keeps_grid(self) -> bool:
        """Whether the tokens are a map."""
        return self.plan.grid is not None

    def forward(self, features: EncoderMaps) -> Tensor:
        """(batch, tokens, hidden)."""
        raise NotImplementedError
