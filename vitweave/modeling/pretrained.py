"""The safe base class of every vitweave model."""

import os
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import PreTrainedModel

from vitweave.modeling.checkpoint_files import (
    check_indices,
    check_shards,
    refuse_pickle,
    replace_when_done,
    stored_model_type,
    unreadable_weights,
)
from vitweave.modeling.tensor_names import repair_scopes, to_live_names


class VitweavePreTrainedModel(PreTrainedModel):
    """A `PreTrainedModel` that closes the holes of transformers that hit vision composites.

    What a subclass does:
        - encoders are direct attributes (`encoder_0`, `encoder_1`, ...), never members of an `nn.ModuleList`;
        - a head keeps its base model under `base_model_prefix`: what lies there must come from the checkpoint, what
          lies beside it may be new;
        - a module with non-persistent buffers sets their values in a method `fill_buffers()`, called by its `__init__`
          and, after loading, by `_init_weights`;
        - a module or layer whose own parameters start otherwise than in transformers sets them, with the functions of
          `transformers.initialization`, in a method `set_start_values()`, called by its `__init__` and by
          `_init_weights`;
        - a head computes its own loss. One that divides by `num_items_in_batch` sets `accepts_loss_kwargs = True`, and
          one that wants a loss of transformers sets `self.loss_type` after `super().__init__`;
        - a model of which the config freezes parts names them in `frozen_parts()`, and calls `freeze()` when built;
        - `built_by` names the class method that builds it from another family's checkpoint.
    """

    main_input_name = "pixel_values"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True

    # Without it, Trainer takes any forward with **kwargs for one that divides its loss by num_items_in_batch, and
    # multiplies a plain mean by the accumulation steps and the number of processes.
    accepts_loss_kwargs = False

    built_by: str | None = None

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        if isinstance(cls.config_class, str):
            raise TypeError(
                f"the config class of {cls.__name__} is the string {cls.config_class!r}: remove"
                f" `from __future__ import annotations` from {cls.__module__}"
            )

    def __init__(self, config, *args, **kwargs):
        super().__init__(config, *args, **kwargs)
        self.loss_type = None  # transformers has put its guess from the class name there

    def post_init(self):
        self._check_sub_models()
        super().post_init()
        self._drop_hints_of_absent_modules()

    def _drop_hints_of_absent_modules(self):
        """Keep those split hints and rules of tensor parallelism that name something in this very model.

        A class lists the blocks of all its options, and FSDP's wrapping refuses a name that it does not find.
        """
        self._no_split_modules &= {type(module).__name__ for module in self.modules()}
        self._no_split_modules |= self._wrapped_embeddings()
        names = (name for kind in (self.named_modules(), self.named_parameters()) for name, _ in kind)
        found = {re.sub(r"\.\d+(?=\.|$)", ".*", name) for name in names}
        self._tp_plan = {name: style for name, style in self._tp_plan.items() if name in found}

    def _check_sub_models(self):
        """Refuse the places where a sub-model is lost: in a module list, and under a name like the base model's."""
        native = self._native_prefixes()
        for name, module in self.named_modules():
            is_list = isinstance(module, (nn.ModuleList, nn.ModuleDict, nn.Sequential)) and not name.startswith(native)
            if is_list and any(isinstance(member, PreTrainedModel) for member in module.children()):
                raise TypeError(
                    f"{type(self).__name__}.{name} holds models in a {type(module).__name__}: their tied weights and"
                    " split hints would be lost. Make them attributes: self.add_module('encoder_0', ...)"
                )
        prefix = self.base_model_prefix
        for name, module in self.named_children():
            if prefix and name != prefix and name.startswith(prefix) and isinstance(module, PreTrainedModel):
                raise TypeError(
                    f"{type(self).__name__}.{name} begins with its base_model_prefix {prefix!r}: transformers would not"
                    " translate its tensor names. Rename one of the two."
                )

    def _wrapped_embeddings(self) -> set[str]:
        """The class of the input embeddings where they lie inside a module that is not split.

        accelerate gives them to FSDP2 after those modules, which torch refuses, unless the hints name them, too.
        """
        try:
            embeddings = self.get_input_embeddings()
        except NotImplementedError:  # some parts of a model have none
            return set()
        parts = [part for part in self.modules() if type(part).__name__ in self._no_split_modules]
        inside = any(module is embeddings for part in parts for module in part.modules())
        return {type(embeddings).__name__} if inside else set()

    def _native_prefixes(self) -> tuple[str, ...]:
        """What the names inside sub-models of transformers' own begin with, e.g. ("encoder_0.", "encoder_1.")."""
        return tuple(
            f"{name}."
            for name, module in self.named_modules()
            if isinstance(module, PreTrainedModel) and not isinstance(module, VitweavePreTrainedModel)
        )

    # Loss ------------------------------------------------------------------------------------------------------------

    @property
    def loss_function(self):
        """The loss set by the class or the user; transformers would fall back to the one of language models."""
        if self.loss_type is None and not hasattr(self, "_loss_function"):
            raise NotImplementedError(
                f"{type(self).__name__} computes its loss itself, in `forward`; to use one of transformers' losses, set"
                " `loss_type` by name"
            )
        return PreTrainedModel.loss_function.fget(self)

    @loss_function.setter
    def loss_function(self, value):
        self._loss_function = value

    # Initialisation --------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        if hasattr(module, "fill_buffers"):
            module.fill_buffers()
        if hasattr(module, "set_start_values"):
            module.set_start_values()

    def _initialize_weights(self, module: nn.Module, *args, **kwargs):
        """As in transformers, which passes by every module of other packages without tensors of its own: start values
        that such a module gives to its children are set here. What was loaded keeps its values."""
        known = getattr(module, "_is_hf_initialized", False)
        super()._initialize_weights(module, *args, **kwargs)
        has_tensors = any(True for _ in (*module.parameters(recurse=False), *module.buffers(recurse=False)))
        if not known and not has_tensors and hasattr(module, "set_start_values"):
            module.set_start_values()

    def _own_buffers(self) -> list[tuple[str, Tensor]]:
        """Non-persistent buffers of our own modules: transformers gives them empty memory when it loads a model."""
        native = self._native_prefixes()
        buffers = [
            (name, buffer) for name, buffer in self.named_non_persistent_buffers() if not name.startswith(native)
        ]
        return [(name, buffer) for name, buffer in buffers if buffer.numel() and buffer.device.type != "meta"]

    def _move_missing_keys_from_meta_to_device(self, *args, **kwargs):
        super()._move_missing_keys_from_meta_to_device(*args, **kwargs)
        for _, buffer in self._own_buffers():
            buffer.fill_(unset_value(buffer))

    # Freezing --------------------------------------------------------------------------------------------------------

    def frozen_parts(self) -> list[nn.Module]:
        """What the config says to keep as it is."""
        return []

    def freeze(self) -> None:
        """Keep the frozen parts as they are: no gradients, no dropout, no updates of running statistics."""
        for part in self.frozen_parts():
            part.requires_grad_(False)
            part.eval()

    def train(self, mode: bool = True):
        super().train(mode)
        for part in self.frozen_parts():
            # adapters put into a frozen part make it trainable, and with that train mode (their dropout) is wanted
            if not any(weight.requires_grad for weight in part.parameters()):
                part.eval()
        return self

    # Loading ---------------------------------------------------------------------------------------------------------

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike | None, *args, **kwargs) -> Any:
        """As in transformers, but only from safetensors, and not with weights of the base model missing.

        With `output_loading_info=True` the caller gets the missing names, as in transformers, instead of an error.
        """
        if kwargs.get("use_safetensors") is False:
            raise ValueError("use_safetensors=False asks for a pickle; vitweave opens safetensors only")
        kwargs["use_safetensors"] = True
        source, subfolder = pretrained_model_name_or_path, kwargs.get("subfolder", "")
        if source is not None:  # None: the weights come as `state_dict`
            cls._refuse_other_model_type(source, kwargs)
            refuse_pickle(source, subfolder)
            check_indices(source, subfolder)
        try:
            loaded = super().from_pretrained(source, *args, **kwargs)
        except SafetensorError as error:
            raise unreadable_weights(source, subfolder, error) from error
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        missing = model.__dict__.pop("_missing_in_checkpoint", ())
        if model is loaded and source is not None:
            model._check_base_model_is_loaded(source, missing)
        model.freeze()  # loading makes every parameter trainable again
        return loaded

    @classmethod
    def _refuse_other_model_type(cls, source: str | os.PathLike, options: dict):
        """Refuse the checkpoint of another family: its weights would be taken where names happen to agree."""
        has_config, found = stored_model_type(source, options)
        expected = cls.config_class.model_type
        if has_config and found != expected:
            remedy = (
                f"use {cls.__name__}.{cls.built_by}({str(source)!r})" if cls.built_by else "open it by its Auto class"
            )
            raise ValueError(
                f"{cls.__name__} expected a checkpoint of model_type {expected!r}, got {found!r} in {source}: {remedy}"
            )

    @staticmethod
    def _load_pretrained_model(model, state_dict, checkpoint_files, load_config, *args, **kwargs):
        check_shards(checkpoint_files)
        repair_scopes(load_config.weight_mapping or [])
        return PreTrainedModel._load_pretrained_model(model, state_dict, checkpoint_files, load_config, *args, **kwargs)

    @staticmethod
    def _finalize_model_loading(model, load_config, loading_info):
        loading_info = PreTrainedModel._finalize_model_loading(model, load_config, loading_info)
        if load_config.hf_quantizer is None:
            # Otherwise `save_pretrained` would write the names of the file that was read, whatever they were
            model._weight_conversions = None
        model._check_buffers_are_set()
        model._missing_in_checkpoint = set(loading_info.missing_keys)  # an adapter loaded next replaces loading_info
        return loading_info

    def _check_buffers_are_set(self):
        unset = [name for name, buffer in self._own_buffers() if is_unset(buffer)]
        if unset:
            raise RuntimeError(
                f"{type(self).__name__} left the non-persistent buffers {unset} without values after loading: set them"
                " in `fill_buffers()` of the module that owns them"
            )

    def _check_base_model_is_loaded(self, source: str | os.PathLike, missing: set[str]):
        """A new head may start from random weights, with transformers' warning; the model below it may not."""
        prefix = self.base_model_prefix
        is_head = bool(prefix) and hasattr(self, prefix)
        below_head = (f"{prefix}.", *self._native_prefixes()) if is_head else ("",)  # every name begins with ""
        lost = sorted(name for name in missing if name.startswith(below_head))
        if lost:
            raise ValueError(
                f"{type(self).__name__} expected all weights of the base model in {source}, but {len(lost)} are missing"
                f" and would be random: {shown(lost)}. Load it with the config it was saved with, and set other"
                " options when the model is built, not in from_pretrained."
            )

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing_keys, *args):
        """Called by `load_state_dict` of this model and of any model around it: the names are translated here."""
        own = {name.removeprefix(prefix): state_dict[name] for name in list(state_dict) if name.startswith(prefix)}
        live = self.state_dict().keys()
        if not own.keys() <= live:
            translated = to_live_names(self, own)
            self._refuse_unknown_names(translated.keys(), live)
            for name in own:
                del state_dict[prefix + name]
            own = translated
        for target, source in getattr(self, "all_tied_weights_keys", {}).items():  # a file holds one of the two
            if target not in own and source in own:
                own[target] = own[source]
        state_dict.update({prefix + name: tensor for name, tensor in own.items()})
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing_keys, *args)

    def _refuse_unknown_names(self, given: set[str], live: set[str]):
        """Tensors that fit nowhere beside weights that get nothing: a native encoder would silently stay as it is."""
        if hasattr(self, "peft_config"):
            return  # adapters rename the layers they wrap; PEFT does its own accounting
        for prefix in self._native_prefixes():
            unknown = sorted(name for name in given - live if name.startswith(prefix))
            left_out = sorted(name for name in live - given if name.startswith(prefix))
            if unknown and left_out:
                raise RuntimeError(
                    f"the state dict names tensors of {type(self).__name__}.{prefix[:-1]} in an unknown way:"
                    f" {shown(unknown)} fit nowhere, while {shown(left_out)} would not be restored. Load the checkpoint"
                    " with from_pretrained in the version of transformers that wrote it, and save it again."
                )

    # Saving ----------------------------------------------------------------------------------------------------------

    def save_pretrained(self, save_directory: str | os.PathLike, *args, **kwargs):
        """As in transformers, but the files appear, or replace earlier ones, only when all of them are written."""
        folder = Path(save_directory)
        if folder.is_file():
            raise NotADirectoryError(f"expected a folder to save {type(self).__name__} in, got the file {folder}")
        if kwargs.get("distributed_checkpoint"):  # every process writes its own part into the shared folder
            return super().save_pretrained(save_directory, *args, **kwargs)
        kwargs.setdefault("repo_id", folder.name)  # read only when pushing; transformers takes the folder's name too
        with replace_when_done(folder) as staging:
            return super().save_pretrained(str(staging), *args, **kwargs)

    def push_to_hub(self, repo_id: str, *, with_code: bool = False, **kwargs) -> Any:
        """As in transformers; with `with_code=True` the folder on the Hub loads without vitweave.

        The options of `vitweave.hub.export.push_to_hub_with_code` (processor, card, ...) are taken then, too.
        """
        if not with_code:
            return super().push_to_hub(repo_id, **kwargs)
        from vitweave.hub.export import push_to_hub_with_code  # stays out of the published code

        return push_to_hub_with_code(self, repo_id, **kwargs)


def keep_weights(*models: nn.Module) -> None:
    """Before loaded models become parts of a new one: what is drawn there leaves all their modules alone.

    Modules without the mark, e.g. adapters put in after loading, would be drawn anew.
    """
    for model in models:
        for module in model.modules():
            module._is_hf_initialized = True


def unset_value(buffer: Tensor) -> float | int | bool:
    """The mark of a buffer whose values were lost: NaN, or the lowest integer; booleans cannot be marked."""
    if buffer.dtype == torch.bool:
        return False
    return float("nan") if buffer.is_floating_point() or buffer.is_complex() else torch.iinfo(buffer.dtype).min


def is_unset(buffer: Tensor) -> bool:
    """Whether every element still is the mark of `unset_value`."""
    if buffer.is_floating_point() or buffer.is_complex():
        return bool(buffer.isnan().all())
    return buffer.dtype not in (torch.bool, torch.uint8) and bool((buffer == unset_value(buffer)).all())


def shown(names: list[str], at_most: int = 5) -> str:
    """The first names of a list that may be long."""
    return ", ".join(names[:at_most]) + (f" and {len(names) - at_most} more" if len(names) > at_most else "")
