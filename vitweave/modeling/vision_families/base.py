"""How one kind of transformers vision model is run layer by layer.

A family reads few inner names of a native model (its embeddings, its list of blocks, its final norm); the tests hold
each of them against the native outputs at the oldest and the newest supported transformers.
"""

from collections.abc import Callable, Iterator

from torch import Tensor, nn
from transformers import MODEL_MAPPING, PreTrainedConfig, PreTrainedModel

from vitweave.configuration.encoder_facts import EncoderFacts, encoder_facts

Inject = Callable[[int, Tensor], Tensor]  # (layer, its state) -> the state that goes on instead


def unchanged(layer: int, state: Tensor) -> Tensor:
    """Nothing is injected."""
    return state


class VisionFamily:
    """A ViT: embeddings, blocks, final norm. The other families say what is different with them."""

    takes_injections = True  # whether something can be injected between the blocks
    embeddings = "embeddings"
    blocks = "layers"
    final_norm: str | None = "layernorm"
    norm_fits_every_layer = True  # False: the final norm belongs to the last layer only (hierarchical models)

    def model_classes(self, config: PreTrainedConfig) -> type[PreTrainedModel] | tuple[type[PreTrainedModel], ...]:
        """The classes this family can run."""
        return MODEL_MAPPING.get(type(config), ())

    def facts(self, model: PreTrainedModel) -> EncoderFacts:
        return encoder_facts(model.config)

    def check_size(self, model: PreTrainedModel, height: int, width: int):
        """Refuse image sizes the native model cannot take."""

    def run(
        self,
        model: PreTrainedModel,
        facts: EncoderFacts,
        pixel_values: Tensor,
        layers: tuple[int, ...],
        final_norm: bool,
        inject: Inject = unchanged,
    ) -> tuple[list[Tensor], Tensor | None]:
        """The layers asked for, (batch, tokens, hidden) or (batch, hidden, height, width), and the pooled output."""
        kept = {}
        for layer, hidden_states in zip(range(max(layers) + 1), self.layers(model, pixel_values, inject), strict=False):
            if layer in layers:
                kept[layer] = hidden_states
        return self.finish(model, facts, [kept[layer] for layer in layers], layers, final_norm)

    def finish(
        self,
        model: PreTrainedModel,
        facts: EncoderFacts,
        states: list[Tensor],
        layers: tuple[int, ...],
        final_norm: bool,
    ) -> tuple[list[Tensor], Tensor | None]:
        """Apply the final norm where it was asked for, and pool the last layer if it is there."""
        finished, pooled = [], None
        for layer, hidden_states in zip(layers, states, strict=True):
            is_last = layer == facts.num_layers
            if is_last or (final_norm and self.norm_fits_every_layer):
                normed = self.norm(model, hidden_states)
                pooled = self.pool(model, hidden_states, normed) if is_last else pooled
                hidden_states = normed if final_norm else hidden_states
            finished.append(hidden_states)
        return finished, pooled

    def layers(self, model: PreTrainedModel, pixel_values: Tensor, inject: Inject = unchanged) -> Iterator[Tensor]:
        """Layer after layer, the embeddings first; a caller that stops asking stops the model.

        Yields (batch, tokens, hidden), or (batch, hidden, height, width) in families without leading tokens.
        """
        hidden_states = self.embed(model, pixel_values)
        yield hidden_states
        options = self.block_options(model, pixel_values)
        for layer, block in enumerate(model.get_submodule(self.blocks), start=1):
            hidden_states = inject(layer, self.run_block(block, hidden_states, options))
            yield hidden_states

    def run_block(self, block: nn.Module, hidden_states: Tensor, options: dict) -> Tensor:
        return block(hidden_states, **options)

    def embed(self, model: PreTrainedModel, pixel_values: Tensor) -> Tensor:
        return model.get_submodule(self.embeddings)(pixel_values)

    def block_options(self, model: PreTrainedModel, pixel_values: Tensor) -> dict:
        return {}

    def norm(self, model: PreTrainedModel, hidden_states: Tensor) -> Tensor:
        """The model's final norm, on what the model itself applies it to."""
        return hidden_states if self.final_norm is None else model.get_submodule(self.final_norm)(hidden_states)

    def pool(self, model: PreTrainedModel, hidden_states: Tensor, normed: Tensor) -> Tensor:
        """(batch, pooled size): the model's own pooler output; without one, the class token after the final norm.

        Args:
            hidden_states: the last layer.
            normed: the last layer after the final norm.
        """
        pooler = getattr(model, "pooler", None)
        return normed[:, 0] if pooler is None else pooler(normed)


class MapFamily(VisionFamily):
    """Models whose layers are maps (batch, hidden, height, width) without leading tokens."""

    final_norm = None
    norm_fits_every_layer = False

    def pool(self, model, hidden_states, normed):
        return normed.mean(dim=(-2, -1))
