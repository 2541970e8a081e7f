"""Picture scores: Fréchet Inception Distance and Inception Score, through torchmetrics.

Features are extracted once a picture and every figure is computed from their rows, so one picture serves
several scores. Shapes: N pictures, D features, C classes, H height, W width.
"""

import pickle
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, islice
from pathlib import Path
from typing import TypeVar
from urllib.error import URLError

import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance, NoTrainInceptionV3
from torchmetrics.image.inception import InceptionScore
from torchvision import transforms

from minigpt4.errors import InputError
from minigpt5.metrics.local import LOCAL_PREFIX, load_feature_network

T = TypeVar("T")

PICTURES_A_BATCH = 32
PUBLISHED_SPLITS = 10
PUBLISHED_SEED = 42
_FID_SIDE = 256
_INCEPTION_URL = (
    "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth"
)


@dataclass(frozen=True)
class PictureEncoder:
    """Pictures → feature rows: a transform, a network, and what to call it in the report."""

    label: str
    transform: Callable[[Image.Image], Tensor]
    network: Callable[[Tensor], Tensor]
    device: torch.device
    initial_draws: int = 0
    """Random numbers that building the untrained network takes; see :func:`published_inception_scores`."""

    @torch.inference_mode()
    def encode(self, pictures: Sequence[Image.Image]) -> Tensor:
        """Return ``[N, D]`` float32 rows on the CPU, in order; neighbours of one size share a batch."""
        tensors = [self.transform(picture) for picture in pictures]
        rows = [
            self.network(torch.stack(chunk).to(self.device)).float().cpu()
            for _, same_size in groupby(tensors, key=lambda tensor: tensor.shape)
            for chunk in _chunks(same_size)
        ]
        return torch.cat(rows)


def read_picture(path: Path) -> Image.Image:
    """Open a picture as RGB.

    Raises:
        InputError: no such file, or no readable picture.
    """
    try:
        with Image.open(path) as picture:
            return picture.convert("RGB")
    except FileNotFoundError:
        raise InputError(f"{path}: the picture is missing; predict again, or delete its prediction") from None
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:
        raise InputError(f"{path}: not a readable picture ({error})") from None


def encode_files(paths: Iterable[Path], encoder: PictureEncoder) -> Tensor:
    """Return ``[N, D]`` rows of picture files (``[0, 0]`` if there are none), reading batch by batch."""
    rows = [encoder.encode([read_picture(path) for path in chunk]) for chunk in _chunks(paths)]
    return torch.cat(rows) if rows else torch.empty(0, 0)


def fid_encoder(setting: str | None, device: torch.device) -> PictureEncoder:
    """Return the encoder of FID: the short side is resized to 256 (bilinear), as published.

    Args:
        setting: None for InceptionV3's 2048 pool features (downloaded once); a ``.pth`` file of its weights; or a
            ``.safetensors`` file of a small feature network.
        device: where it runs.

    Raises:
        InputError: a file that does not fit, or weights that cannot be downloaded.
    """
    resize = transforms.Resize(_FID_SIDE, interpolation=transforms.InterpolationMode.BILINEAR)
    transform = transforms.Compose([resize, transforms.ToTensor()])
    return _feature_encoder(setting, "metrics.fid_network", "2048", transform, device)


def inception_encoder(setting: str | None, device: torch.device) -> PictureEncoder:
    """Return the encoder of the Inception Score: logits of the picture in its own size, as published.

    Args and errors as for :func:`fid_encoder`.
    """
    return _feature_encoder(setting, "metrics.inception_network", "logits_unbiased", transforms.ToTensor(), device)


def frechet_distance(real_ND: Tensor, made_MD: Tensor) -> float | None:
    """Return the Fréchet distance of two feature sets (Heusel et al., NeurIPS 2017).

    ‖μ₁ − μ₂‖² + tr(Σ₁ + Σ₂ − 2 (Σ₁Σ₂)^½), accumulated in float64. None if a set has fewer than two rows.
    """
    if len(real_ND) < 2 or len(made_MD) < 2:
        return None
    if max(len(real_ND), len(made_MD)) < real_ND.shape[1]:
        return _frechet_distance_of_few(real_ND.double(), made_MD.double())
    metric = FrechetInceptionDistance(feature=_Rows(real_ND.shape[1]))
    metric.update(real_ND, real=True)
    metric.update(made_MD, real=False)
    return metric.compute().item()


def inception_score(logits_NC: Tensor) -> float | None:
    """Return exp E KL(p(y|x) ‖ p(y)) over all pictures at once (Salimans et al., NeurIPS 2016).

    Unlike the published figure it depends on neither order nor seed. None without pictures.
    """
    return _inception_score(logits_NC, splits=1) if len(logits_NC) else None


def published_inception_scores(
    *logits_NC: Tensor, networks: Sequence[PictureEncoder] = (), splits: int = PUBLISHED_SPLITS
) -> list[float | None]:
    """Return the mean Inception Score over ``splits`` parts of each set, rows shuffled as published.

    torchmetrics shuffles with torch's global generator, which the published program seeds with 42 before it builds
    its metrics. So the figure depends on the order of the rows, on which set comes first, and on the random
    numbers that building the networks takes. CLIP's share of these differs by open_clip release and is left out.
    The global generator is restored afterwards.

    Args:
        logits_NC: one set each for the replies and the baseline, in the published order.
        networks: those the published program builds first; a network it builds twice stands here twice.
        splits: parts of each set.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(PUBLISHED_SEED)
        torch.rand(sum(network.initial_draws for network in networks))
        return [_inception_score(logits, splits) if len(logits) else None for logits in logits_NC]


def _chunks(items: Iterable[T]) -> Iterator[list[T]]:
    iterator = iter(items)
    while chunk := list(islice(iterator, PICTURES_A_BATCH)):
        yield chunk


def _frechet_distance_of_few(real_ND: Tensor, made_MD: Tensor) -> float:
    """Return the Fréchet distance of fewer rows than features, without a matrix of features by features.

    With Σ₁ = XᵀX and Σ₂ = YᵀY, Σ₁Σ₂ has the eigenvalues of (XYᵀ)(XYᵀ)ᵀ and otherwise zeros, so the trace of its
    root is the sum of the singular values of XYᵀ, which is as large as the sets are.
    """
    means = real_ND.mean(dim=0), made_MD.mean(dim=0)
    first_ND, second_MD = (
        (rows - mean) / (len(rows) - 1) ** 0.5 for rows, mean in zip((real_ND, made_MD), means, strict=True)
    )
    root = torch.linalg.svdvals(first_ND @ second_MD.T).sum()
    spread = first_ND.square().sum() + second_MD.square().sum()
    return float((means[0] - means[1]).square().sum() + spread - 2 * root)


class _Rows(nn.Module):
    """Stands where torchmetrics expects the network: what it is given are features already."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, rows_ND: Tensor) -> Tensor:
        return rows_ND


def _inception_score(logits_NC: Tensor, splits: int) -> float:
    with warnings.catch_warnings():
        # torchmetrics warns that it keeps all rows, and of a standard deviation over one split.
        warnings.simplefilter("ignore", UserWarning)
        metric = InceptionScore(feature=_Rows(logits_NC.shape[1]), splits=splits)
        metric.update(logits_NC)
        return metric.compute()[0].item()


def _feature_encoder(
    setting: str | None,
    key: str,
    output: str,
    transform: Callable[[Image.Image], Tensor],
    device: torch.device,
) -> PictureEncoder:
    if setting is not None and setting.endswith(".safetensors"):
        small = load_feature_network(Path(setting), key).to(device)
        return PictureEncoder(f"{LOCAL_PREFIX}network {setting}", transform, small, device, _initial_draws(small))
    path = Path(setting) if setting is not None else _download_inception(key)
    inception = _load_inception(path, key, output).to(device)
    label = (
        f"InceptionV3 {output} (torch-fidelity weights)" if setting is None else f"InceptionV3 {output} ({path})"
    )

    def network(pixels_N3HW: Tensor) -> Tensor:
        rows_ND: Tensor = inception((pixels_N3HW * 255).byte())
        return rows_ND

    return PictureEncoder(label, transform, network, device, _initial_draws(inception))


def _initial_draws(network: nn.Module) -> int:
    """Return how many uniform numbers PyTorch draws to initialise the network: one a weight and bias."""
    layers = [layer for layer in network.modules() if isinstance(layer, nn.Conv2d | nn.Linear)]
    return sum(parameter.numel() for layer in layers for parameter in layer.parameters())


def _download_inception(key: str) -> Path:
    path = Path(torch.hub.get_dir()) / "checkpoints" / Path(_INCEPTION_URL).name
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(_INCEPTION_URL, str(path), progress=False)
        except (URLError, OSError) as error:
            raise InputError(
                f"{key}: InceptionV3's weights cannot be downloaded ({error}); fetch {_INCEPTION_URL} yourself "
                "and give the file, or give a small local network (docs/metrics.md)"
            ) from None
    return path


def _load_inception(path: Path, key: str, output: str) -> nn.Module:
    try:
        # torch-fidelity reads the file without restriction; one that passes here holds nothing but tensors.
        torch.load(path, map_location="cpu", weights_only=True)
        return NoTrainInceptionV3("inception-v3-compat", [output], str(path))
    except FileNotFoundError:
        raise InputError(f"{key}: {path} does not exist") from None
    except (RuntimeError, OSError, EOFError, ValueError, TypeError, pickle.UnpicklingError) as error:
        raise InputError(f"{key}: {path} does not hold torch-fidelity's InceptionV3 weights: {error}") from None
