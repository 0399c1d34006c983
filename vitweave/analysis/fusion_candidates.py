"""What a search over fusions chooses from: layers and their fusion, and of several encoders which, and their fusion."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

from transformers import PreTrainedConfig

from vitweave.analysis.encoder_fusion_comparison import small_options
from vitweave.configuration.configuration_layer_fusion import preset_layers
from vitweave.configuration.encoder_facts import encoder_facts
from vitweave.modeling.layer_fusion.base import LayerFusion
from vitweave.modeling.layer_fusion.registry import LAYER_FUSIONS, build_layer_fusion
from vitweave.modeling.options import pick

LAYER_CHOICES = ("last4", "quarters", "thirds", "middle_last", "all", "singles")
ENCODER_FUSION_CHOICES = ("channel_concat", "add")
ALONE = "layer"  # one layer by itself, under a norm of its own
# options by which a fusion fuses patches, where its defaults do not
DENSE = {
    "concat": {"dense": True},
    "cross_layer_attention": {"dense": True},
    "recurrent": {"on": "patches"},
    "weighted_sum": {"dense": True},
}


@dataclass(frozen=True)
class Candidate:
    """One way to read frozen encoders.

    Args:
        encoders: their numbers; of one encoder the layers are fused, of several the layers of each lie side by side
            and the encoders are fused.
        layers: of each encoder, shallow to deep.
        fusion: name of a layer fusion, `ALONE`, or of several encoders that of an encoder fusion.
        options: of the fusion.
    """

    encoders: tuple[int, ...]
    layers: tuple[tuple[int, ...], ...]
    fusion: str
    options: dict

    @property
    def name(self) -> str:
        """What tables call it; unique in a search."""
        shown = [" ".join(map(str, layers)) for layers in self.layers]
        if self.encoders == (0,):
            return f"{self.fusion} {shown[0]}"
        parts = [f"encoder {index} [{layers}]" for index, layers in zip(self.encoders, shown, strict=True)]
        return f"{self.fusion} of {' and '.join(parts)}"

    @property
    def fusion_type(self) -> str:
        """The fusion as a config names it."""
        return "weighted_sum" if self.fusion == ALONE else self.fusion

    @property
    def is_tower(self) -> bool:
        """Whether it joins several encoders."""
        return len(self.encoders) > 1

    def layer_fusion(self, hidden_size: int) -> LayerFusion:
        """The fusion of a single encoder's layers."""
        return build_layer_fusion(self.fusion_type, len(self.layers[0]), hidden_size, self.options)


def equal_layers(config: PreTrainedConfig) -> list[int]:
    """The layers that share width and grid with the last: all of a ViT, the last stage of a hierarchy."""
    facts = encoder_facts(config)
    shapes = [(facts.hidden_sizes[layer], facts.strides[layer]) for layer in range(facts.num_layers + 1)]
    return [layer for layer in range(1, facts.num_layers + 1) if shapes[layer] == shapes[-1]]


def layer_sets(config: PreTrainedConfig, choices: Sequence[str]) -> list[tuple[int, ...]]:
    """The sets of layers behind the names of `LAYER_CHOICES`, or behind lists as "3,6,9,12"; each once."""
    known = equal_layers(config)
    sets: list[tuple[int, ...]] = []
    for choice in choices:
        if choice == "singles":
            sets += [(layer,) for layer in known]
        elif choice == "middle_last":
            sets.append(tuple(sorted({known[(len(known) - 1) // 2], known[-1]})))
        elif "," in choice or choice.isdigit():
            parts = [part.strip() for part in choice.split(",")]
            layers = tuple(sorted({int(part) for part in parts if part.isdigit()}))
            if not all(part.isdigit() for part in parts) or not set(layers) <= set(known):
                raise ValueError(f"expected layers of one width and grid, {known}, got {choice!r}")
            sets.append(layers)
        else:
            sets.append(tuple(known[place - 1] for place in preset_layers(choice, len(known)) if place <= len(known)))
    return list(dict.fromkeys(sets))


def layer_candidate(
    encoder: int, layers: tuple[int, ...], fusion: str, dense: bool, given: dict | None = None
) -> Candidate:
    """One fusion of one encoder's layers, in its direct form: what it returns takes the place of the last layer."""
    if len(layers) == 1:
        fusion = ALONE
    kind = "weighted_sum" if fusion == ALONE else fusion
    options = {"direct": True, **(DENSE.get(kind, {}) if dense else {}), **((given or {}).get(fusion) or {})}
    return Candidate((encoder,), (layers,), fusion, options)


def baselines(config: PreTrainedConfig, dense: bool, given: dict | None = None) -> list[Candidate]:
    """What every choice must justify itself against: the first encoder's last layer, and its last four side by side."""
    last4 = layer_sets(config, ["last4"])[0]
    return [layer_candidate(0, last4[-1:], ALONE, dense, given), layer_candidate(0, last4, "concat", dense, given)]


def search_space(
    configs: Sequence[PreTrainedConfig],
    dense: bool,
    layers: Sequence[str] = LAYER_CHOICES,
    fusions: Sequence[str] = tuple(LAYER_FUSIONS),
    encoder_fusions: Sequence[str] = ENCODER_FUSION_CHOICES,
    given: dict[str, dict] | None = None,
) -> list[Candidate]:
    """All candidates, the baselines first, each once.

    Args:
        configs: of the encoders.
        dense: the task reads maps; fusions without any are left out.
        layers: see `layer_sets`.
        fusions: of layers; single layers need none.
        encoder_fusions: of several encoders.
        given: name of a fusion -> its options.
    """
    given = given or {}
    for name in fusions:
        pick(LAYER_FUSIONS, name, "fusion_type")
    strange = sorted(given.keys() - {ALONE, "concat", *fusions, *encoder_fusions})
    if strange:
        raise ValueError(f"expected options of the fusions {[*fusions, *encoder_fusions]}, got some of {strange}")
    if any((options or {}).get("norm") == "shared" for options in given.values()):
        raise ValueError('norm="shared" reads other features than the rest; search it by itself, or leave it out')
    found = baselines(configs[0], dense, given)
    for index, config in enumerate(configs):
        width = encoder_facts(config).hidden_sizes[-1]
        for chosen in layer_sets(config, layers):
            tried = [layer_candidate(index, chosen, fusion, dense, given) for fusion in fusions]
            found += [one for one in tried if not dense or one.layer_fusion(width).map_channels]
        found.append(layer_candidate(index, (equal_layers(config)[-1],), ALONE, dense, given))
    if len(configs) > 1:
        found += tower_candidates(configs, encoder_fusions, given)
    return list({candidate.name: candidate for candidate in found}.values())


def tower_candidates(configs: Sequence[PreTrainedConfig], fusions: Sequence[str], given: dict) -> list[Candidate]:
    """Every subset of two or more encoders under every encoder fusion, with the last layer of each or its quarters."""
    found = []
    for size in range(2, len(configs) + 1):
        for encoders in combinations(range(len(configs)), size):
            for choice in ("last", "quarters"):
                sets = [layer_sets(configs[index], ["quarters"])[0] for index in encoders]
                sets = [layers[-1:] if choice == "last" else layers for layers in sets]
                width = len(sets[0]) * encoder_facts(configs[encoders[0]]).hidden_sizes[-1]
                for fusion in fusions:
                    options = {**small_options(fusion, width), **(given.get(fusion) or {})}
                    found.append(Candidate(encoders, tuple(sets), fusion, options))
    return found
