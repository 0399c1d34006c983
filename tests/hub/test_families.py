"""Which image processors are published, and which class a saved one is opened with."""

import sys
import textwrap

import pytest
from transformers import BitImageProcessorPil, ViTConfig

from vitweave.hub import families as families_module
from vitweave.hub.families import find_family, find_processor_class, processor_references

PIL = """
    from transformers.image_processing_backends import PilBackend

    class ToyImageProcessorPil(PilBackend):
        pass
"""
TORCHVISION = """
    import no_such_torchvision

    class ToyImageProcessor:
        pass
"""


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """Register a family with a PIL processor whose torchvision twin cannot be imported here."""
    folder = tmp_path / "toyweave" / "processing"
    folder.mkdir(parents=True)
    for package in (folder, folder.parent):
        (package / "__init__.py").touch()
    (folder / "image_processing_pil_toy.py").write_text(textwrap.dedent(PIL))
    (folder / "image_processing_toy.py").write_text(textwrap.dedent(TORCHVISION))
    monkeypatch.syspath_prepend(tmp_path)
    from toyweave.processing.image_processing_pil_toy import ToyImageProcessorPil

    row = (ViTConfig, {}, ({"torchvision": None, "pil": ToyImageProcessorPil},))
    monkeypatch.setattr(families_module, "FAMILIES", (*families_module.FAMILIES, row))
    yield folder
    for name in [name for name in sys.modules if name.partition(".")[0] == "toyweave"]:
        del sys.modules[name]


def test_both_backends_are_published_where_only_one_is_installed(toy):
    processor = find_processor_class("ToyImageProcessor")()
    assert processor_references(processor) == {
        "torchvision": "toyweave.processing.image_processing_toy.ToyImageProcessor",
        "pil": "toyweave.processing.image_processing_pil_toy.ToyImageProcessorPil",
    }


@pytest.mark.parametrize("task", ["segmentation", "depth"])
def test_processors_of_every_task_are_published_and_opened(task):
    name = f"{task.title()}ImageProcessor"
    expected = {
        "torchvision": f"vitweave.processing.image_processing_{task}.{name}",
        "pil": f"vitweave.processing.image_processing_pil_{task}.{name}Pil",
    }
    assert processor_references(find_processor_class(name)()) == expected


def test_a_processor_of_one_backend_is_published_alone(toy):
    (toy / "image_processing_toy.py").unlink()
    assert list(processor_references(find_processor_class("ToyImageProcessor")())) == ["pil"]


def test_processors_of_transformers_need_no_code():
    assert processor_references(BitImageProcessorPil()) == {}


def test_a_saved_processor_is_opened_for_the_installed_backend(toy, monkeypatch):
    assert find_processor_class("ToyImageProcessor").__name__ == "ToyImageProcessorPil"
    monkeypatch.setattr(families_module, "is_torchvision_available", lambda: False)
    for named in ("BitImageProcessor", "BitImageProcessorFast", "BitImageProcessorPil"):
        assert find_processor_class(named) is BitImageProcessorPil


@pytest.mark.parametrize("named", ["EvilProcessor", "pipeline", "ViTConfig", None])
def test_a_foreign_processor_class_is_refused(named):
    with pytest.raises(ValueError, match="expected an image processor of transformers or one of"):
        find_processor_class(named)


def test_families_are_found_by_model_type():
    assert find_family("specialized_vit").config_class.model_type == "specialized_vit"
    assert find_family("specialized_vit").package == "vitweave"
    with pytest.raises(ValueError, match="vitweave has"):
        find_family("vit")
