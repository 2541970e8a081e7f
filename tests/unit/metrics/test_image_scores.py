import numpy as np
import pytest
import torch
from PIL import Image
from scipy.linalg import sqrtm
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from torch_fidelity.metric_isc import isc_features_to_metric
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.inception import InceptionScore
from torchvision.transforms.functional import to_tensor

from minigpt4.errors import InputError
from minigpt5.metrics.image import (
    _Rows,
    encode_files,
    fid_encoder,
    frechet_distance,
    inception_encoder,
    inception_score,
    published_inception_scores,
    read_picture,
)
from minigpt5.metrics.local import SmallFeatureNetwork, load_feature_network
from tests.unit.metrics.small_store import MODELS, picture

CPU = torch.device("cpu")


def _features(seed: int, count: int, width: int = 6) -> torch.Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


def test_frechet_distance_equals_scipy():
    real, made = _features(0, 40).double(), _features(1, 30).double() * 1.5 + 0.3
    covariances = [np.cov(rows.numpy(), rowvar=False) for rows in (real, made)]
    means = [rows.numpy().mean(0) for rows in (real, made)]
    root = sqrtm(covariances[0] @ covariances[1]).real
    expected = ((means[0] - means[1]) ** 2).sum() + np.trace(covariances[0] + covariances[1] - 2 * root)
    assert frechet_distance(real, made) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(("many", "few"), [(2, 2), (5, 3), (20, 20), (39, 4)])
def test_frechet_distance_of_fewer_rows_than_features_equals_torchmetrics(many, few):
    real, made = _features(0, many, 40), _features(1, few, 40) * 1.5 + 0.3
    metric = FrechetInceptionDistance(feature=_Rows(40))
    metric.update(real, real=True)
    metric.update(made, real=False)
    for first, second in ((real, made), (made, real)):
        assert frechet_distance(first, second) == pytest.approx(metric.compute().item(), rel=1e-5)


def test_frechet_distance_needs_two_rows_a_side():
    assert frechet_distance(_features(0, 1), _features(1, 5)) is None
    assert frechet_distance(_features(0, 5), torch.empty(0, 0)) is None


def test_inception_score_equals_torch_fidelity():
    logits = _features(2, 33, width=5)
    expected = isc_features_to_metric(logits, splits=1, shuffle=False)["inception_score_mean"]
    assert inception_score(logits) == pytest.approx(expected, rel=1e-6)
    assert inception_score(logits.flip(0)) == pytest.approx(expected, rel=1e-6)
    assert inception_score(torch.empty(0, 0)) is None


def test_published_inception_score_is_the_mean_over_shuffled_parts():
    logits = _features(3, 33, width=5)
    torch.manual_seed(42)
    parts = logits[torch.randperm(33)].double().softmax(1).numpy()
    divergences = []
    for start in range(0, 33, 4):  # ten chunks of 33 rows hold four each
        part = parts[start : start + 4]
        divergences.append(np.exp((part * np.log(part / part.mean(0))).sum(1).mean()))
    assert published_inception_scores(logits)[0] == pytest.approx(np.mean(divergences), rel=1e-5)


def test_published_inception_score_leaves_the_global_generator_alone():
    state = torch.get_rng_state()
    first = published_inception_scores(_features(4, 20), _features(5, 20))
    assert torch.equal(torch.get_rng_state(), state)
    assert published_inception_scores(_features(4, 20), _features(5, 20)) == first
    assert published_inception_scores(torch.empty(0, 0)) == [None]


def test_published_inception_score_counts_the_networks_built_before():
    encoder = inception_encoder(str(MODELS / "is_features.safetensors"), CPU)
    logits = _features(6, 25, width=10)
    torch.manual_seed(42)
    SmallFeatureNetwork(10)
    metric = InceptionScore(feature=torch.nn.Identity())
    metric.update(logits)
    assert published_inception_scores(logits, networks=[encoder]) == [metric.compute()[0].item()]


def test_fid_resizes_the_short_side_to_256():
    encoder = fid_encoder(str(MODELS / "fid_features.safetensors"), CPU)
    assert encoder.transform(picture(1, (100, 50))).shape == (3, 256, 512)
    resized = picture(1).resize((256, 256), Image.Resampling.BILINEAR)
    assert torch.equal(encoder.transform(picture(1)), to_tensor(resized))


def test_pictures_of_different_sizes_keep_their_order(tmp_path):
    sizes = [(48, 48), (60, 30), (48, 48), (30, 60), (30, 60)]
    paths = [tmp_path / f"{index}.png" for index in range(len(sizes))]
    for index, (path, size) in enumerate(zip(paths, sizes, strict=True)):
        picture(index, size).save(path)
    encoder = fid_encoder(str(MODELS / "fid_features.safetensors"), CPU)
    rows = encode_files(paths, encoder)
    for path, row in zip(paths, rows, strict=True):
        torch.testing.assert_close(encode_files([path], encoder)[0], row)


def test_unreadable_picture_is_named(tmp_path):
    (tmp_path / "torn.png").write_bytes(b"not a picture")
    with pytest.raises(InputError, match=r"torn\.png"):
        read_picture(tmp_path / "torn.png")
    with pytest.raises(InputError, match="missing"):
        read_picture(tmp_path / "absent.png")


@pytest.mark.parametrize("name", ["absent.safetensors", "wrong.safetensors", "clip_tiny/model.safetensors"])
def test_feature_network_that_does_not_fit_is_named(tmp_path, name):
    (tmp_path / "wrong.safetensors").write_bytes(b"\x00" * 20)
    path = MODELS / name if name.startswith("clip") else tmp_path / name
    with pytest.raises(InputError, match=r"metrics\.fid_network"):
        fid_encoder(str(path), CPU)


def test_inception_weights_must_be_plain_tensors(tmp_path):
    class Surprise:
        def __reduce__(self):
            return (print, ("unpickled",))

    torch.save({"weights": Surprise()}, tmp_path / "inception.pth")
    with pytest.raises(InputError, match=r"metrics\.inception_network"):
        inception_encoder(str(tmp_path / "inception.pth"), CPU)
    with pytest.raises(InputError, match="does not exist"):
        inception_encoder(str(tmp_path / "absent.pth"), CPU)


def test_inception_weights_file_is_used(tmp_path):
    class Untrained(FeatureExtractorInceptionV3):
        def load_state_dict(self, *_, **__):
            """Keep the random weights."""

    torch.save({}, tmp_path / "none.pth")
    weights = tmp_path / "inception.pth"
    torch.manual_seed(0)
    torch.save(Untrained("inception-v3-compat", ["2048"], str(tmp_path / "none.pth")).state_dict(), weights)
    picture(3).save(tmp_path / "a.png")
    encoder = fid_encoder(str(weights), CPU)
    metric = FrechetInceptionDistance(feature=2048, feature_extractor_weights_path=str(weights))
    pixels = to_tensor(picture(3).resize((256, 256), Image.Resampling.BILINEAR))[None]
    expected = metric.inception((pixels * 255).byte()).float()
    torch.testing.assert_close(encode_files([tmp_path / "a.png"], encoder), expected)
    assert "InceptionV3" in encoder.label
    torch.manual_seed(1)
    Untrained("inception-v3-compat", ["2048"], str(tmp_path / "none.pth"))
    after_building = torch.rand(1)
    torch.manual_seed(1)
    torch.rand(encoder.initial_draws)
    assert torch.rand(1) == after_building


def test_small_network_saves_and_loads(tmp_path):
    from safetensors.torch import save_file

    network = SmallFeatureNetwork(num_features=7, width=4, grid=3)
    save_file(network.state_dict(), tmp_path / "network.safetensors")
    loaded = load_feature_network(tmp_path / "network.safetensors", "metrics.fid_network")
    pixels = torch.rand(2, 3, 40, 50, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(loaded(pixels), network(pixels))
    assert loaded.num_features == 7
    torch.testing.assert_close(loaded((pixels * 255).byte()), network((pixels * 255).byte().float() / 255))
