"""What the configs of `examples/accelerate` mean to a process that `accelerate launch` starts."""

import os
from pathlib import Path
from unittest.mock import patch

from accelerate.commands import launch
from accelerate.utils import FullyShardedDataParallelPlugin
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env

FOLDER = Path(__file__).parents[1] / "examples" / "accelerate"


def launch_environment(name: str) -> dict[str, str]:
    """The variables that the processes get."""
    arguments = launch.launch_command_parser().parse_args(["--config_file", str(FOLDER / name), "train.py"])
    with patch.dict(os.environ):
        for key in [key for key in os.environ if key.startswith(("FSDP", "ACCELERATE"))]:
            del os.environ[key]
        with (
            patch.object(launch, "deepspeed_launcher") as deepspeed,
            patch.object(launch, "multi_gpu_launcher") as gpus,
        ):
            launch.launch_command(arguments)  # everything but the start of the processes
        if deepspeed.called:
            return prepare_deepspeed_cmd_env(deepspeed.call_args.args[0])[1]
        return prepare_multi_gpu_env(gpus.call_args.args[0])


def plugin_of(name: str) -> FullyShardedDataParallelPlugin:
    """The plugin that a process makes of them."""
    with patch.dict(os.environ, launch_environment(name), clear=True):
        return FullyShardedDataParallelPlugin()
