"""The launch configs of accelerate are read by accelerate, and mean what their comments say."""

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate_configs import FOLDER, launch_environment, plugin_of

TYPES = {"ddp.yaml": "MULTI_GPU", "fsdp2.yaml": "FSDP", "deepspeed.yaml": "DEEPSPEED"}


def test_every_config_is_in_the_table():
    assert {path.name for path in FOLDER.iterdir()} == set(TYPES)


@pytest.mark.parametrize("name", TYPES)
def test_accelerate_reads_every_key(name):
    config = load_config_from_file(str(FOLDER / name))  # refuses keys that it does not know
    assert config.distributed_type == TYPES[name] and config.num_machines == 1


def test_the_options_of_fsdp_reach_the_plugin():
    plugin = plugin_of("fsdp2.yaml")
    assert plugin.fsdp_version == 2 and plugin.reshard_after_forward is True
    assert plugin.auto_wrap_policy.__name__ == "transformer_auto_wrap_policy"
    assert plugin.state_dict_type.name == "FULL_STATE_DICT" and not plugin.cpu_ram_efficient_loading


def test_the_options_of_deepspeed_reach_its_processes():
    variables = launch_environment("deepspeed.yaml")
    assert variables["ACCELERATE_USE_DEEPSPEED"] == "true" and variables["ACCELERATE_MIXED_PRECISION"] == "bf16"
    assert variables["ACCELERATE_DEEPSPEED_ZERO_STAGE"] == "2"
    # the Trainer puts in what its own arguments say
    assert variables["ACCELERATE_GRADIENT_ACCUMULATION_STEPS"] == variables["ACCELERATE_GRADIENT_CLIPPING"] == "auto"
