"""The card of a training run: what was measured on a part of its data, so that `vitweave verify` can do it again."""

import shlex
import sys
from collections.abc import Iterable
from pathlib import Path

from accelerate import PartialState

from vitweave.hub.card import CardInfo, CardMetric
from vitweave.hub.checksums import sha256


def save_run_card(folder: str | Path, data: str | Path, split: str, metrics: Iterable[tuple[str, float, dict]]) -> None:
    """Write `vitweave_card.json` beside a model, with the command line of this process and the data's SHA-256.

    Of several processes the first writes it.

    Args:
        folder: of the saved model.
        data: the folder of the data set; its last part is the name on the card.
        split: the part that was measured on.
        metrics: (type, value, options of the evaluation), see `evaluations`.
    """
    if not PartialState().is_main_process:
        return
    name, command = Path(data).resolve().name, shlex.join(["python", *sys.argv])
    found = [CardMetric(kind, value, command, name, split=split, options=options) for kind, value, options in metrics]
    CardInfo(training_command=command, metrics=found, data_sha256={name: sha256(Path(data))}).save(folder)
