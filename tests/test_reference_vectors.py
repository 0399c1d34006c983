"""Replays stored reference vectors: what to build is chosen by each sidecar's `kind` and configuration.

`VITWEAVE_REFERENCE_DIR` names a folder of `<topic>/vectors/*.json` with tensors in the `.safetensors` beside each; the
default is the subset in tests/reference. The kinds of a topic are the `KINDS` of the modules `reference_*.py` beside
this file, found by their name.
"""

import json
import os
import re
from fnmatch import fnmatch
from importlib import import_module
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers import AttentionInterface
from transformers.initialization import no_init_weights

from vitweave.analysis.measurement import measure
from vitweave.analysis.norms import norm_outliers
from vitweave.analysis.pca import pca_maps
from vitweave.configuration.configuration_specialized_vit import SpecializedViTConfig
from vitweave.modeling.depth_losses import gradient_loss, sig_loss
from vitweave.modeling.heads.depth_bins import DepthBinsHead
from vitweave.modeling.heads.linear import LinearHead
from vitweave.modeling.losses import CrossEntropyLoss
from vitweave.modeling.modeling_specialized_vit import SpecializedViTModel
from vitweave.modeling.specialized_layers import SpecializedViTLayer, eager_attention
from vitweave.training.depth_metrics import depth_metrics
from vitweave.training.lora import lora_config
from vitweave.training.metrics import ConfusionMatrix
from vitweave.training.probing import knn_scores, linear_probe_input

REFERENCE = Path(os.environ.get("VITWEAVE_REFERENCE_DIR") or Path(__file__).parent / "reference")
CASES = sorted(REFERENCE.glob("*/vectors/*.json"))
TABLES = sorted(REFERENCE.glob("*/param_counts.json"))
TOLERANCE = {torch.float64: 1e-10, torch.float32: 5e-5}
TOPIC_TOLERANCE = {"layer_fusion": {torch.float64: 1e-9, torch.float32: 2e-5}}


class Case:
    """One sidecar and its tensors, cast to the dtype under test."""

    def __init__(self, path: Path, dtype: torch.dtype):
        self.sidecar = json.loads(path.read_text())
        self.kind, self.config = self.sidecar["kind"], self.sidecar.get("config", {})
        self.dtype, self.tolerance = dtype, TOPIC_TOLERANCE.get(path.parts[-3], TOLERANCE)[dtype]
        own = self.sidecar.get("tolerance")
        if isinstance(own, dict):  # of outputs computed in float32; an exact one is exact in both types
            self.tolerance = own["atol"]
        tensors = path.with_suffix(".safetensors")
        self.tensors = {
            name: tensor.to(dtype) if tensor.is_floating_point() else tensor
            for name, tensor in (load_file(tensors) if tensors.exists() else {}).items()
        }

    def group(self, prefix: str) -> dict[str, torch.Tensor]:
        """Tensors below `prefix.`, without it."""
        return {n.removeprefix(prefix + "."): t for n, t in self.tensors.items() if n.startswith(prefix + ".")}

    def check(self, name: str, actual: torch.Tensor):
        expected = self.tensors[name].to(actual.dtype)
        torch.testing.assert_close(
            actual.detach(),
            expected.reshape(actual.shape) if expected.numel() == 1 else expected,
            atol=self.tolerance,
            rtol=self.tolerance,
            equal_nan=True,
            msg=lambda text: f"{name}: {text}",
        )


def twin_name(name: str) -> str:
    """`q_proj.patch.weight` -> `q_proj.weight`, `q_proj.cls.weight` -> `q_proj_cls.weight`, `.cls_up` -> `_cls_up`."""
    return re.sub(r"\.(cls(?:_down|_up)?)\.", r"_\1.", name.replace(".patch.", "."))


def vit_config(facts: dict, **changes) -> SpecializedViTConfig:
    facts = {**facts, **changes}
    return SpecializedViTConfig(
        hidden_size=facts["hidden"],
        num_hidden_layers=facts["layers"],
        num_attention_heads=facts["heads"],
        patch_size=facts["patch"],
        image_size=facts["image"],
        mlp_ratio=facts["mlp_ratio"],
        use_swiglu_ffn=facts["ffn"] == "swiglu",
        num_register_tokens=facts["registers"],
        num_cls_tokens=facts["num_cls"],
        layer_norm_eps=facts["eps"],
        norm_blocks=facts["norm_blocks"],
        qkv_blocks=facts["qkv_blocks"],
        qkv_parts=facts.get("qkv_parts", "qkv"),
        proj_blocks=facts["proj_blocks"],
        mlp_blocks=facts["mlp_blocks"],
        register_role=facts["register_role"],
        attention_bias="kv" if facts["attention_bias"] else False,
        specialize_final_norm=facts["final_norm"],
        cls_rank=facts["rank"],
        cls_alpha=facts["alpha"] or None,
    )


def load(module: torch.nn.Module, state: dict, unused: list[str], case: Case):
    state = {twin_name(n): t for n, t in state.items() if not any(fnmatch(n, pattern) for pattern in unused)}
    module.load_state_dict(state, strict=True)
    return module.to(case.dtype).eval()


def check_vit(case: Case, model: SpecializedViTModel, prefix: str) -> torch.Tensor:
    outputs = model(case.tensors["input.pixel_values"], output_hidden_states=True)
    produced = {"last_hidden_state": outputs.last_hidden_state, "pooler_output": outputs.pooler_output}
    produced |= {f"hidden_states.{index}": state for index, state in enumerate(outputs.hidden_states)}
    wanted = case.group(prefix)
    assert wanted
    for name in wanted:
        case.check(f"{prefix}.{name}", produced[name])
    return outputs.last_hidden_state


def replay_vit(case: Case):
    for name, facts in (case.sidecar.get("cases") or {"": {}}).items():
        changes = {"registers": facts.get("num_register_tokens"), "attention_bias": facts.get("attention_bias")}
        changes = {key: value for key, value in changes.items() if value is not None}
        config = vit_config(case.config, **changes)
        model = load(
            SpecializedViTModel(config).to(case.dtype), case.group("state"), facts.get("state_keys_not_used", []), case
        )
        check_vit(case, model, f"output.{name}" if name else "output")


def check_gradients(case: Case, module: torch.nn.Module):
    gradients = {name: parameter.grad for name, parameter in module.named_parameters()}
    checked = [name for name in case.group("grad") if not name.startswith("input.")]
    assert checked
    for name in checked:
        case.check(f"grad.{name}", gradients[twin_name(name)])


def replay_vit_grads(case: Case):
    model = load(SpecializedViTModel(vit_config(case.config)).to(case.dtype), case.group("state"), [], case)
    (check_vit(case, model, "output") * case.tensors["input.cotangent"]).sum().backward()
    check_gradients(case, model)


def replay_block(case: Case):
    config = vit_config(case.config)
    config._attn_implementation = "reference_probe"
    seen = {}

    def probe(module, query, key, value, *args, **kwargs):
        tokens = query.shape[2]  # the learnt extra key comes last
        for name, states in (("q", query), ("k", key[:, :, :tokens]), ("v", value[:, :, :tokens])):
            seen[name] = states.transpose(1, 2).flatten(2)
        context, seen["attention_probs"] = eager_attention(module, query, key, value, *args, **kwargs)
        seen["context"] = context.flatten(2)
        return context, seen["attention_probs"]

    AttentionInterface.register("reference_probe", probe)
    block = load(SpecializedViTLayer(config, index=0).to(case.dtype), case.group("state"), [], case)

    def remember_input(name):  # norms are whole only where they are read
        return lambda module, args: seen.__setitem__(name, args[0])

    block.attention.register_forward_pre_hook(remember_input("norm1"))
    block.mlp.register_forward_pre_hook(remember_input("norm2"))
    block.norm2.register_forward_pre_hook(remember_input("residual1"))
    block.attention.register_forward_hook(lambda module, args, output: seen.__setitem__("attn_out", output[0]))
    block.mlp.register_forward_hook(lambda module, args, output: seen.__setitem__("mlp_out", output))
    hidden_states = case.tensors["input.hidden_states"].requires_grad_()
    seen["hidden_states"] = block(hidden_states)
    for name in case.group("output"):
        case.check(f"output.{name}", seen[name])
    (seen["hidden_states"] * case.tensors["input.cotangent"]).sum().backward()
    case.check("grad.input.hidden_states", hidden_states.grad)
    check_gradients(case, block)


def replay_analysis(case: Case):
    model = load(SpecializedViTModel(vit_config(case.config)).to(case.dtype), case.group("state"), [], case)
    measured = measure(model, case.tensors["input.pixel_values"].split(2))
    outliers, pca = norm_outliers(measured.patch_norms), pca_maps(measured.features, measured.grid)
    produced = {f"{name}.{tap}": v for tap, found in measured.taps.items() for name, v in vars(found).items()}
    produced |= {"patch_norms": measured.patch_norms, "outlier_threshold": torch.tensor(outliers.threshold)}
    produced |= {"outlier_mask": outliers.mask, "pca.components": pca.components, "pca.map": pca.maps}
    produced |= {"pca.explained_variance_ratio": pca.explained_variance_ratio}
    for name in case.group("output"):
        case.check(f"output.{name}", produced[name])


def replay_heads(case: Case):
    replay_segmentation_head(case, case.sidecar["params"])
    replay_depth_head(case, case.sidecar["params"])
    replay_probes(case, case.sidecar["params"])


def replay_segmentation_head(case: Case, params: dict):
    given, labels = case.group("input.seg"), case.tensors["input.seg.labels"]
    maps = [given[f"feature.{index}"] for index in range(sum(name.startswith("feature.") for name in given))]
    state = {
        name.replace("bn.", "norm.").replace("conv.", "classifier."): t for name, t in case.group("state.seg").items()
    }
    num_labels = len(state["classifier.bias"])
    head = LinearHead([m.shape[1] for m in maps], num_labels=num_labels).to(case.dtype)
    assert head.norm.eps == params["bn_eps"] and head.norm.momentum == params["bn_momentum"]
    left_out = head.load_state_dict(state, strict=False)
    assert set(left_out.missing_keys) <= {"norm.num_batches_tracked"} and not left_out.unexpected_keys

    logits = head.eval()(maps)
    upsampled = F.interpolate(logits, size=labels.shape[-2:], mode="bilinear", align_corners=False)
    case.check("output.seg.logits_eval", logits)
    case.check("output.seg.logits_upsampled", upsampled)
    case.check("output.seg.ce_loss", CrossEntropyLoss(ignore_index=params["ignore_index"])(upsampled, labels))
    assert torch.equal(upsampled.argmax(1).int(), case.tensors["output.seg.pred"])
    confusion = ConfusionMatrix(num_labels, params["ignore_index"])
    confusion.update(upsampled.argmax(1), labels)
    found = confusion.compute()
    case.check("output.seg.iou", torch.tensor(found["per_class_iou"], dtype=torch.float64))
    case.check("output.seg.miou", torch.tensor(found["mean_iou"], dtype=torch.float64))
    case.check("output.seg.pixel_accuracy", torch.tensor(found["pixel_accuracy"], dtype=torch.float64))

    case.check("output.seg.logits_train", head.train()(maps))
    case.check("output.seg.running_mean_after", head.norm.running_mean)
    case.check("output.seg.running_var_after", head.norm.running_var)


def replay_depth_head(case: Case, params: dict):
    patches, cls = case.tensors["input.depth.patch_feature"], case.tensors["input.depth.cls_token"]
    target, facts = case.tensors["input.depth.target"], params["depth"]
    options = {
        "bins": facts["bins"],
        "min_depth": facts["min"],
        "max_depth": facts["max"],
        "upsample": facts["upsample"],
    }
    predictions = {}
    for spacing, name in (("linear", "prediction"), ("log", "prediction_log_bins")):
        head = DepthBinsHead([patches.shape[1]], spacing=spacing, **options).to(case.dtype)
        head.load_state_dict({n.replace("conv.", "classifier."): t for n, t in case.group("state.depth").items()})
        predictions[name] = head([patches], [cls])
        case.check(f"output.depth.{name}", predictions[name])
    resized = F.interpolate(predictions["prediction"], size=target.shape[-2:], mode="bilinear", align_corners=False)
    case.check("output.depth.prediction_resized", resized)
    case.check("output.depth.sigloss", sig_loss(resized, target))
    case.check("output.depth.sigloss_warmup", sig_loss(resized, target, warm_up=True))
    case.check("output.depth.gradient_loss", gradient_loss(resized, target))
    metrics = depth_metrics(resized, target)
    order = ("rmse", "abs_rel", "a1", "a2", "a3", "log10")
    case.check("output.depth.metrics", torch.tensor([metrics[name] for name in order], dtype=torch.float64))


def replay_probes(case: Case, params: dict):
    given, scores = case.group("input.knn"), case.group("output.knn")
    ks = tuple(int(name.removeprefix("scores_k")) for name in scores)
    num_classes = next(iter(scores.values())).shape[1]
    found = knn_scores(given["train"], given["train_labels"], given["test"], num_classes, ks, **params["knn"])
    for k in ks:
        case.check(f"output.knn.scores_k{k}", found[k])
    given = case.group("input.linear")
    cls_tokens = [given[f"cls.{index}"] for index in range(sum(name.startswith("cls.") for name in given))]
    for name in case.group("output.linear"):
        n = int(re.search(r"_n(\d+)", name)[1])
        patches = given["patch_tokens_last"] if "avgpool" in name else None
        case.check(f"output.linear.{name}", linear_probe_input(cls_tokens[-n:], patches))


def replay_lora_cls(case: Case):
    from peft import get_peft_model, set_peft_model_state_dict

    shared = vit_config(case.config, norm_blocks=[], qkv_blocks=[], proj_blocks=[], mlp_blocks=[])
    vanilla = load(SpecializedViTModel(shared).to(case.dtype), case.group("state.vanilla"), [], case)
    pixel_values = case.tensors["input.pixel_values"]
    case.check("output.vanilla.last_hidden_state", vanilla(pixel_values).last_hidden_state)
    model = SpecializedViTModel(vit_config(case.config)).to(case.dtype).eval()
    state = vanilla.state_dict()
    model.load_state_dict({name: state[name.replace("_cls.", ".")] for name in model.state_dict()})
    config = lora_config(model, "cls", rank=case.sidecar["r"], alpha=case.sidecar["lora_alpha"])
    adapted = get_peft_model(model, config)
    result = set_peft_model_state_dict(adapted, {twin_name(n): t for n, t in case.group("state.adapter").items()})
    assert not result.unexpected_keys
    case.check("output.adapted.last_hidden_state", adapted(pixel_values).last_hidden_state)
    merged = adapted.merge_and_unload().state_dict()
    wanted = case.group("output.merged")
    assert wanted
    for name in wanted:
        case.check(f"output.merged.{name}", merged[twin_name(name)])


KINDS = {
    "lora_cls": replay_lora_cls,
    "vit": replay_vit,
    "vit_native_lowrank": replay_vit,
    "vit_grads": replay_vit_grads,
    "block": replay_block,
    "analysis": replay_analysis,
    "heads": replay_heads,
}
for module in sorted(Path(__file__).parent.glob("reference_*.py")):
    KINDS |= import_module(module.stem).KINDS


@pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("path", CASES, ids=lambda path: f"{path.parts[-3]}-{path.stem}")
def test_vector(path: Path, dtype: torch.dtype):
    case = Case(path, dtype)
    assert case.kind in KINDS, f"{path.name} is of the unknown kind {case.kind!r}; known: {sorted(KINDS)}"
    KINDS[case.kind](case)


def count_flags(row: str, facts: dict) -> dict:
    """The configuration behind a row of a table of added parameters."""
    third = facts["first_third_ceil" if "ceil" in row else "first_third_floor"]
    blocks = facts["layers"] if "all_blocks" in row else third
    low_rank = re.search(r"lowrank_qkv.*_r(\d+)_(separate|fused)", row)
    norm = row.startswith(("norm", "layernorm"))
    return {
        "specialize_norm": norm,
        "specialize_layer_scale": not row.startswith("layernorm_only"),
        "specialize_final_norm": "final_norm" in row,
        "qkv_blocks": blocks if "qkv" in row else 0,
        "proj_blocks": third if "proj" in row else 0,
        "mlp_blocks": third if "mlp" in row else 0,
        "cls_rank": int(low_rank[1]) if low_rank else 0,
        "cls_rank_fused": bool(low_rank) and low_rank[2] == "fused",
        "attention_bias": "kv" if "attention_bias" in row else False,
    }


def count_parameters(facts: dict, registers: int = 0, **flags) -> int:
    plain = {"specialize_norm": False, "qkv_blocks": 0} | flags
    config = SpecializedViTConfig(
        hidden_size=facts["hidden"],
        num_hidden_layers=facts["layers"],
        num_attention_heads=facts["heads"],
        intermediate_size=facts["ffn_hidden"],
        use_swiglu_ffn=facts["ffn"] == "swiglu",
        image_size=518,
        num_register_tokens=registers,
        **plain,
    )
    with torch.device("meta"), no_init_weights():
        return sum(parameter.numel() for parameter in SpecializedViTModel(config).parameters())


ROWS = [(table.parts[-2], name, facts) for table in TABLES for name, facts in json.loads(table.read_text()).items()]


@pytest.mark.parametrize(
    ("topic", "name", "facts"),
    [  # of the same formulas the deepest in the slow tier
        pytest.param(topic, name, facts, id=f"{topic}-{name}", marks=[pytest.mark.slow] if facts["layers"] > 24 else [])
        for topic, name, facts in ROWS
    ],
)
def test_parameter_table(topic: str, name: str, facts: dict):
    vanilla = count_parameters(facts)
    assert vanilla == facts["vanilla"]
    assert count_parameters(facts, registers=4) == facts["vanilla_reg4"]
    added = {row: count_parameters(facts, **count_flags(row, facts)) - vanilla for row in facts["added"]}
    assert added == facts["added"]
    assert {row: round(100 * count / vanilla, 4) for row, count in added.items()} == facts["percent"]
