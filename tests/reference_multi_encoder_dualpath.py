"""Replay of LLaVA-HR's whole tower of two paths, converted from its official names."""

import hashlib
import importlib.util
import re

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import CLIPVisionConfig, ConvNextConfig, TimmWrapperConfig

from vitweave.configuration.configuration_multi_encoder import MultiEncoderConfig
from vitweave.modeling.convert_multi_encoder import convert_multi_encoder

FORMULA = (
    "x[b,c,y,x] = sin(0.013*(y+1)*(c+1) + 0.7*b) * cos(0.017*(x+2) - 0.3*c) + 0.25*sin(0.21*x + 0.17*y); indices from"
    " 0, float64, then cast to float32"
)


def picture(case, side: str) -> Tensor:
    """The image of the sidecar's formula, whose bytes must be those the vector was made from."""
    facts = case.sidecar["images"][side]
    assert case.sidecar["image_formula"] == FORMULA
    b, c, y, x = np.meshgrid(*(np.arange(size, dtype=np.float64) for size in facts["shape"]), indexing="ij")
    values = np.sin(0.013 * (y + 1) * (c + 1) + 0.7 * b) * np.cos(0.017 * (x + 2) - 0.3 * c)
    image = (values + 0.25 * np.sin(0.21 * x + 0.17 * y)).astype(np.float32)
    assert hashlib.sha256(image.tobytes()).hexdigest() == facts["sha256"]
    return torch.from_numpy(image).to(case.dtype)


def slow_path(facts: dict) -> tuple[ConvNextConfig | TimmWrapperConfig, dict]:
    """ConvNeXt in transformers, or in timm where its norms have another eps than 1e-6."""
    dims, depths = facts["dims"], facts["depths"]
    if facts["norm_eps"] == 1e-6:
        return ConvNextConfig(hidden_sizes=dims, depths=depths), {}
    if importlib.util.find_spec("timm") is None:
        pytest.skip("needs timm: ConvNextModel of transformers has no other eps than 1e-6")
    arguments = {"dims": dims, "depths": depths, "norm_eps": facts["norm_eps"]}
    return TimmWrapperConfig(architecture="convnext_base", model_args=arguments), {"channels": dims[-1], "stride": 32}


def tower_config(case, side: int, adapters: bool) -> MultiEncoderConfig:
    """LLaVA-HR for images of this side."""
    slow, options = slow_path(case.sidecar["convnext"])
    fast_side = max(int(side / 32 * 14), 336)
    fast = {"image_size": fast_side, "resize": "bilinear_ac", "class_token": "drop_before", "final_norm": False}
    return MultiEncoderConfig(
        encoder_configs=[CLIPVisionConfig(**case.sidecar["clip"]), slow],
        encoder_options=[fast, {"final_norm": False, **options}],
        image_size=side,
        fusion_type="mixture_of_resolution",
        fusion_options=None if adapters else {"adapter_layers": []},
    )


def replay_dual_path_tower(case):
    state = {f"model.vision_tower.{name}": tensor for name, tensor in case.group("state").items()}
    runs = [re.fullmatch(r"tokens_(\d+)_(no)?adapter", name) for name in case.group("output")]
    assert runs and all(runs)
    for run in runs:
        config = tower_config(case, int(run[1]), adapters=run[2] is None)
        model, report = convert_multi_encoder(state, "llava-hr", config)
        assert model.dtype == case.dtype and not report.new
        assert all("align_stages_latent" in name for name in report.dropped) and bool(report.dropped) == bool(run[2])
        with torch.no_grad():
            tokens = model(picture(case, run[1])).last_hidden_state
        assert tokens.shape[1] == config.num_tokens
        case.check(f"output.{run[0]}", tokens)


KINDS = {"llava_hr_dual_path_tower": replay_dual_path_tower}
