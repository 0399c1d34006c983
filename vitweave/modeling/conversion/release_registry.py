"""Which release family a preset's checkpoints belong to."""

from vitweave.modeling.conversion.cambrian import CAMBRIAN
from vitweave.modeling.conversion.eagle import EAGLE
from vitweave.modeling.conversion.leo import INTERNVL, LEO
from vitweave.modeling.conversion.llava_hr import LLAVA_HR
from vitweave.modeling.conversion.mini_gemini import MINI_GEMINI
from vitweave.modeling.conversion.release import Release

RELEASES: dict[str, Release] = {
    "cambrian": CAMBRIAN,
    "eagle-x4": EAGLE,
    "eagle-x5": EAGLE,
    "internvl": INTERNVL,
    "leo": LEO,
    "llava-hr": LLAVA_HR,
    "llava-hr-x": LLAVA_HR,
    "mgm": MINI_GEMINI,
    "mgm-hd": MINI_GEMINI,
}


def find_release(preset: str) -> Release:
    """The release family of a preset."""
    if preset not in RELEASES:
        raise ValueError(f"unknown preset {preset!r}; known: {sorted(RELEASES)}")
    return RELEASES[preset]
