"""LoRA on the language model of a vision-language model, with projector and fusion trained in full beside it."""

from typing import TYPE_CHECKING

from vitweave.modeling.modeling_multi_encoder_vlm import MultiEncoderVlmForConditionalGeneration
from vitweave.training.lora import QKV, check_names, is_linear, pattern_of

if TYPE_CHECKING:
    from peft import LoraConfig

LANGUAGE_MODEL = "model.language_model."
CONNECTOR = ("model.vision_tower.fusion", "model.multi_modal_projector", "model.image_newline")


def vlm_lora_config(
    model: MultiEncoderVlmForConditionalGeneration,
    rank: int = 16,
    alpha: float | None = None,
    modules_to_save: list[str] | None = None,
    **options,
) -> "LoraConfig":
    """The PEFT config for a second stage: low-rank updates of all linears of the language model.

    Encoders whose `encoder_options` say `lora` get updates of q, k and v. Fusion, projector and newline are trained and
    saved in full; LLaVA-HR's helper, which goes by the name of the tower, would leave its fusion out.
    `peft.get_peft_model(model, vlm_lora_config(model))` attaches it.

    Args:
        alpha: the update is scaled by alpha / rank; None = rank.
        modules_to_save: full names of further modules to train in full, e.g. "lm_head".
        options: of `peft.LoraConfig`, e.g. `lora_dropout`, `use_dora`.
    """
    from peft import LoraConfig  # needed only while training; importing vitweave must not require it

    if "target_modules" in options:
        raise ValueError("target_modules follows from the model; build a peft.LoraConfig for other targets")
    tower = model.config.vision_config
    adapted = tuple(f"model.vision_tower.encoder_{i}." for i, given in enumerate(tower.options) if given.lora)
    modules = dict(model.named_modules())
    linears = [name for name, module in modules.items() if is_linear(module)]
    targets = [name for name in linears if name.startswith(LANGUAGE_MODEL)]
    targets += [name for name in linears if name.startswith(adapted) and name.split(".")[-1] in QKV]
    if not targets:
        raise ValueError(f"found no linear layer in the language model {model.config.text_config.model_type!r}")
    whole = [name for name in CONNECTOR if name in modules and any(True for _ in modules[name].parameters())]
    saved = [*whole, *(modules_to_save or [])]
    check_names(saved, targets, list(modules))
    return LoraConfig(
        r=rank,
        lora_alpha=rank if alpha is None else alpha,
        target_modules=pattern_of(targets),
        modules_to_save=saved or None,
        base_model_name_or_path=model.name_or_path or None,
        task_type="CAUSAL_LM",
        **options,
    )
