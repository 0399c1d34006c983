"""Training a vision-language model in stages: which of its parts learn when."""

from dataclasses import dataclass

from torch import nn

from vitweave.modeling.modeling_multi_encoder_vlm import MultiEncoderVlmForConditionalGeneration
from vitweave.modeling.options import pick

ALIGNMENT = "alignment"  # of a mixture of resolutions: all of the fusion but the adapters inside of the encoder
CONNECTOR = ("projector", "fusion")
# What the released recipes train. In LEO the projectors of the encoders are a part of the fusion.
STAGES: dict[str, tuple[str, ...]] = {
    "projector": ("projector",),
    "projector_and_fusion": CONNECTOR,
    "projector_and_fusion+language_model": (*CONNECTOR, "language_model"),
    "all": (*CONNECTOR, "language_model", "encoders"),
    "llava-hr-1": ("projector", ALIGNMENT),
    "llava-hr-2": (*CONNECTOR, "language_model", "encoders"),
    "eagle-1": ("projector",),
    "eagle-2": (*CONNECTOR, "language_model", "encoders"),
    "mgm-1": CONNECTOR,
    "mgm-2": (*CONNECTOR, "language_model"),
    "leo-1": CONNECTOR,
    "leo-2": (*CONNECTOR, "language_model"),
    "cambrian-1": CONNECTOR,
    "cambrian-2": (*CONNECTOR, "language_model"),
}


@dataclass(frozen=True)
class PartRow:
    """One part of a model: how many parameters it has, and how many of them learn."""

    part: str
    parameters: int
    trained: int


def apply_stage(model: MultiEncoderVlmForConditionalGeneration, stage: str) -> list[PartRow]:
    """Let those parts of a model learn that a stage trains, and no others; `stage_table` prints what is returned.

    What the config freezes stays frozen: `freeze_vision_encoders`, `freeze_language_model`, `encoder_options`.

    Args:
        model: without adapters; for LoRA see `vlm_lora_config`.
        stage: one of `STAGES`.
    """
    chosen = pick(STAGES, stage, "stage")
    if hasattr(model, "peft_config") or hasattr(model, "get_base_model"):
        raise ValueError("expected a model without adapters: either choose a stage, or attach LoRA (vlm_lora_config)")
    tower = model.model.vision_tower
    model.requires_grad_(False)
    groups = {
        "projector": [model.model.multi_modal_projector, model.model.image_newline],
        "fusion": [tower.fusion],
        ALIGNMENT: [part for name, part in tower.fusion.named_children() if name != "adapters"],
        "language_model": [model.model.language_model, model.lm_head],
        "encoders": tower.encoders,
    }
    for name in chosen:
        for part in groups[name]:
            if part is not None:
                part.requires_grad_(True)
    model.freeze()
    rows = part_rows(model)
    if not any(row.trained for row in rows):
        raise ValueError(
            f"the stage {stage!r} trains {list(chosen)}, which have no parameters here, or the config freezes them"
        )
    return rows


def parts_of(model: MultiEncoderVlmForConditionalGeneration) -> dict[str, list[nn.Module | None]]:
    """The parts by name, in the order of the data."""
    core, tower = model.model, model.model.vision_tower
    encoders = {
        f"encoder {index} ({encoder.config.model_type})": [encoder] for index, encoder in enumerate(tower.encoders)
    }
    return encoders | {
        "fusion": [tower.fusion],
        "projector": [core.multi_modal_projector, core.image_newline],
        "language model": [core.language_model, model.lm_head],
    }


def part_rows(model: MultiEncoderVlmForConditionalGeneration) -> list[PartRow]:
    """What each part has and what of it learns; shared weights count once."""
    rows = []
    for name, modules in parts_of(model).items():
        own = {id(weight): weight for module in modules if module is not None for weight in module.parameters()}
        trained = sum(weight.numel() for weight in own.values() if weight.requires_grad)
        rows.append(PartRow(name, sum(weight.numel() for weight in own.values()), trained))
    return rows


def stage_table(rows: list[PartRow]) -> str:
    """The rows as text, with their sum below."""
    total = PartRow("all", sum(row.parameters for row in rows), sum(row.trained for row in rows))
    cells = [("part", "parameters", "trained")]
    cells += [(row.part, f"{row.parameters:,}", f"{row.trained:,}" if row.trained else "-") for row in (*rows, total)]
    widths = [max(len(row[column]) for row in cells) for column in range(3)]
    return "\n".join(f"{a:<{widths[0]}}  {b:>{widths[1]}}  {c:>{widths[2]}}" for a, b, c in cells)
