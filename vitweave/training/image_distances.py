"""How far drawn images are from real ones as a whole set: FID and KID, by torchmetrics."""

import importlib.util
import warnings

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModel, PreTrainedModel

from vitweave.modeling.vision_encoder import VisionEncoder, find_vision_model
from vitweave.processing.sensor_encodings import IMAGENET_MEAN, IMAGENET_STD

IMAGE_DISTANCES = ("fid", "kid")


def require(package: str, purpose: str) -> None:
    """Refuse to go on without a package of the extra."""
    if importlib.util.find_spec(package) is None:
        raise ImportError(f"{purpose} needs {package}, which is not installed: pip install vitweave[fid]")


class EncoderFeatures(nn.Module):
    """The embedding of a frozen vision encoder as the features that sets of images are compared by.

    With a self-supervised ViT such as DINOv2 this is the FID of arXiv:2306.04675; it is not comparable with published
    figures, which are Inception's.

    Args:
        encoder: a model (a classifier or the like gives its encoder), a folder or a Hub id.
        size: height and width in pixels that images are resized to.
        mean, std: per channel, of the encoder's own processor.
    """

    def __init__(
        self,
        encoder: PreTrainedModel | str,
        size: int = 224,
        mean: tuple[float, ...] = IMAGENET_MEAN,
        std: tuple[float, ...] = IMAGENET_STD,
    ):
        super().__init__()
        if isinstance(encoder, str):
            encoder = AutoModel.from_pretrained(encoder)
        self.encoder = VisionEncoder(find_vision_model(encoder))
        self.size = size
        for name, numbers in (("mean", mean), ("std", std)):
            self.register_buffer(name, torch.tensor(numbers).view(-1, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Features (batch, hidden) of images (batch, 3, height, width) in [0, 1]."""
        images = F.interpolate(images, size=(self.size, self.size), mode="bicubic", antialias=True).clamp(0, 1)
        return self.encoder((images - self.mean) / self.std).pooled.flatten(1)


class GivenFeatures(nn.Module):
    """Stands where torchmetrics wants an extractor: both distances are of features that were computed once."""

    def __init__(self, num_features: int):
        super().__init__()
        self.num_features = num_features

    def forward(self, features: Tensor) -> Tensor:
        return features


class ImageDistances:
    """FID (arXiv:1706.08500) and KID (arXiv:1801.01401) between all drawn and all real images; 0 is equal.

    By torchmetrics, which among the well-kept libraries needs least and takes any network as the extractor, so it works
    offline; clean-fid and torch-fidelity want torchvision, and clean-fid reads pictures from folders.

    FID keeps sums only and is biased upwards where there are few images for its features; KID is unbiased, keeps the
    features of all images, and is the mean over subsets drawn with a seed of its own.

    Args:
        features: maps images (batch, 3, height, width) in [0, 1] to (batch, features): `EncoderFeatures` or any other
            module, e.g. an Inception with the weights that published figures use; it is kept frozen in eval mode.
        kid_subsets, kid_subset_size: of KID; where there are fewer images, all are one subset.
    """

    def __init__(self, features: nn.Module, kid_subsets: int = 100, kid_subset_size: int = 1000):
        require("torchmetrics", "FID and KID")
        self.features = features.eval().requires_grad_(False)
        self.kid_subsets, self.kid_subset_size = kid_subsets, kid_subset_size
        self.reset()

    def reset(self) -> None:
        self.fid, self.kid = None, None
        self.counts = {True: 0, False: 0}

    @torch.no_grad()
    def update(self, images: Tensor, real: bool) -> None:
        """Add images (batch, 3, height, width) in [0, 1]."""
        features = self.features.to(images.device)(images.float())
        if features.ndim != 2 or features.shape[0] != images.shape[0]:
            raise ValueError(
                f"expected features (batch, features) of {len(images)} images, got {tuple(features.shape)}"
            )
        if self.fid is None:
            self.build(features)
        self.fid.update(features, real=real)
        self.kid.update(features, real=real)
        self.counts[real] += len(images)

    def build(self, features: Tensor) -> None:
        """The metrics for features like these."""
        from torchmetrics.image.fid import FrechetInceptionDistance
        from torchmetrics.image.kid import KernelInceptionDistance

        given = GivenFeatures(features.shape[1])
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Metric `Kernel Inception Distance` will save all", UserWarning)
            self.kid = KernelInceptionDistance(given, self.kid_subsets).to(features.device)
        self.fid = FrechetInceptionDistance(given).to(features.device)

    def compute(self) -> dict[str, float]:
        """fid and kid; NaN where there are fewer than two images of a kind."""
        count = min(self.counts.values())
        if count < 2:
            return dict.fromkeys(IMAGE_DISTANCES, float("nan"))
        self.kid.subset_size = min(self.kid_subset_size, count)
        if self.kid.subset_size == max(self.counts.values()):
            self.kid.subsets = 1  # all subsets are the same
        with torch.random.fork_rng(devices=[]):  # a run that is evaluated goes on as one that is not
            torch.manual_seed(0)
            return {"fid": self.fid.compute().item(), "kid": self.kid.compute()[0].item()}
