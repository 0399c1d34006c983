"""The language models of released multi-encoder models: their names, and their facts in `config.json`."""

from dataclasses import fields
from functools import partial

from torch import Tensor
from transformers import CONFIG_MAPPING, PreTrainedConfig

from vitweave.modeling.conversion.release import Part, TensorNames

LANGUAGE_MODEL = "model.language_model."
ROTARY = ((r".*rotary_emb\.inv_freq", "rotary frequencies, computed from the config"),)
LLAMA = TensorNames(dropped=ROTARY)
INTERN_LM2 = TensorNames(
    renames=(
        (r"^tok_embeddings\.", "embed_tokens."),
        (r"\.attention\.wqkv\.", ".self_attn.{q_proj,k_proj,v_proj}."),
        (r"\.attention\.wo\.", ".self_attn.o_proj."),
        (r"\.feed_forward\.w1\.", ".mlp.gate_proj."),
        (r"\.feed_forward\.w2\.", ".mlp.down_proj."),
        (r"\.feed_forward\.w3\.", ".mlp.up_proj."),
        (r"\.attention_norm\.", ".input_layernorm."),
        (r"\.ffn_norm\.", ".post_attention_layernorm."),
    ),
    dropped=((r".*attention\.rotary_emb\.inv_freq", ROTARY[0][1]), *ROTARY),
)
# What the `model_type` of a released config.json contains -> the type in transformers. InternLM2 becomes a Llama.
TEXT_TYPES = ("gemma", "mistral", "phi3", "qwen2")
UNSUPPORTED_TEXT_TYPES = ("mixtral",)


def llama_parts(text_config: PreTrainedConfig | None) -> list[Part]:
    """LLaVA's layout, in which the language model has no prefix of its own; the names are those of transformers."""
    parts = [Part(f"model.{name}.", f"{LANGUAGE_MODEL}{name}.", LLAMA) for name in ("embed_tokens", "layers", "norm")]
    return [*parts, Part("lm_head.", "lm_head.")]


def intern_parts(text_config: PreTrainedConfig | None) -> list[Part]:
    """InternVL's layout; the language model is InternLM2, or one of transformers."""
    split = grouped_rows if text_config is None else partial(grouped_rows, config=text_config)
    return [
        Part("language_model.model.", LANGUAGE_MODEL, INTERN_LM2, split),
        Part("language_model.output.", "lm_head."),
        Part("language_model.lm_head.", "lm_head."),
    ]


def grouped_rows(tensor: Tensor, count: int, config: PreTrainedConfig) -> list[Tensor]:
    """Query, key and value rows of InternLM2's `wqkv`.

    Its rows are, for each key-value head, those of the query heads that share it, of the key and of the value.
    """
    kv_heads = config.num_key_value_heads or config.num_attention_heads
    group = config.num_attention_heads // kv_heads
    if tensor.shape[0] % (kv_heads * (group + 2)):
        raise ValueError(
            f"expected a number of rows of wqkv that {kv_heads} key-value heads with {group} query heads each divide,"
            f" got {tensor.shape[0]}; check num_attention_heads and num_key_value_heads of text_config"
        )
    heads = tensor.unflatten(0, (kv_heads, group + 2, -1))  # (kv heads, group + 2, head size, ...)
    return [heads[:, :group].flatten(0, 2), heads[:, group].flatten(0, 1), heads[:, group + 1].flatten(0, 1)]


def text_config_of(stored: dict | None, text_key: str | None) -> PreTrainedConfig | None:
    """The language model's config out of a released `config.json`; None without one.

    Args:
        text_key: under which entry its facts are.
    """
    facts = (stored or {}).get(text_key) if text_key else stored
    if not facts or "hidden_size" not in facts:
        return None
    stored_type = str(facts.get("model_type", ""))
    if any(name in stored_type for name in UNSUPPORTED_TEXT_TYPES):
        raise ValueError(
            f"cannot convert the experts of a language model of the type {stored_type!r}; convert its tower"
        )
    config_class = CONFIG_MAPPING[next((name for name in TEXT_TYPES if name in stored_type), "llama")]
    known = {item.name for item in fields(config_class)} | {"rope_theta", "rope_scaling"}
    left_out = ("model_type", "architectures", "dtype", "torch_dtype", "transformers_version")
    taken = {name: value for name, value in facts.items() if name in known and name not in left_out}
    if "internlm2" in stored_type:
        taken["attention_bias"] = taken["mlp_bias"] = False
        if facts.get("bias"):
            raise ValueError("this InternLM2 has biases in its projections, which no released one has")
    return config_class(**taken)
