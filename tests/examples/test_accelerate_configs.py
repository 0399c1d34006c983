"""The launch configs of accelerate are read by accelerate, and mean what their comments say."""

import os
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import FullyShardedDataParallelPlugin
from accelerate.utils.launch import prepare_multi_gpu_env

FOLDER = Path(__file__).parents[2] / "examples" / "accelerate"
TYPES = {"ddp.yaml": "MULTI_GPU", "fsdp2.yaml": "FSDP", "deepspeed.yaml": "DEEPSPEED"}


def test_every_config_is_in_the_table():
    assert {path.name for path in FOLDER.iterdir()} == set(TYPES)


@pytest.mark.parametrize("name", TYPES)
def test_accelerate_reads_every_key(name):
    config = load_config_from_file(str(FOLDER / name))  # refuses keys that it does not know
    assert config.distributed_type == TYPES[name] and config.num_machines == 1


def test_the_options_of_fsdp_reach_the_plugin(monkeypatch):
    for key in [key for key in os.environ if key.startswith(("FSDP", "ACCELERATE"))]:
        monkeypatch.delenv(key)
    arguments = launch_command_parser().parse_args(["--config_file", str(FOLDER / "fsdp2.yaml"), "train.py"])
    arguments = _validate_launch_command(arguments)[0]
    for key, value in prepare_multi_gpu_env(arguments).items():
        if key.startswith("FSDP"):
            monkeypatch.setenv(key, value)
    plugin = FullyShardedDataParallelPlugin()
    assert plugin.fsdp_version == 2 and plugin.reshard_after_forward is True
    assert plugin.auto_wrap_policy.__name__ == "transformer_auto_wrap_policy"
    assert plugin.state_dict_type.name == "FULL_STATE_DICT" and plugin.cpu_ram_efficient_loading
