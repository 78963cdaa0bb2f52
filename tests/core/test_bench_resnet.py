"""scripts/bench_resnet.py and scripts/cifar_resnet.py: the network, the pictures, and a run from archive to page."""

import io
import json
import tarfile

import pytest
import torch
from torch import nn

import bench_resnet
import cifar_resnet
from cifar_resnet import Pictures, augmented, batches, build, normalised, read, split
from sparsify.bench.timing import Times

Image = pytest.importorskip("PIL.Image")
CLASSES = ["cat", "dog", "emu", "fox", "gnu", "hen", "owl", "pig", "rat", "yak"]
EACH = 16


@pytest.fixture
def archive(tmp_path):
    """Ten classes of noisy pictures of one colour each."""
    generator = torch.Generator().manual_seed(0)
    with tarfile.open(tmp_path / "pictures.tar.xz", "w:xz") as tar:
        for label, name in enumerate(CLASSES):
            for number in range(EACH):
                colour = 20 + 24 * torch.tensor([label, 9 - label, (3 * label) % 10]).view(1, 1, 3)
                noise = torch.randint(-15, 16, (32, 32, 3), generator=generator)
                stream = io.BytesIO()
                Image.fromarray((colour + noise).to(torch.uint8).numpy()).save(stream, "JPEG")
                member = tarfile.TarInfo(f"train/{name}/{number:04}.jpg")
                member.size = stream.tell()
                stream.seek(0)
                tar.addfile(member, stream)
    return tmp_path / "pictures.tar.xz"


@pytest.fixture
def weights(tmp_path):
    """A checkpoint as the published ones are."""
    torch.manual_seed(0)
    state = {f"module.{key}": value for key, value in build("resnet20").state_dict().items()}
    (tmp_path / "weights").mkdir()
    torch.save({"state_dict": state, "best_prec1": 10.0}, tmp_path / "weights" / "resnet20-0123.th")
    return tmp_path / "weights"


def test_the_networks_have_the_published_sizes():
    counts = {name: sum(p.numel() for p in build(name).parameters()) for name in ("resnet20", "resnet32")}
    assert counts == {"resnet20": 269_722, "resnet32": 464_154}
    assert build("resnet20")(torch.randn(2, 3, 32, 32)).shape == (2, 10)


def test_short_cuts_pass_over_pixels_and_add_channels():
    block = cifar_resnet.Block(4, 8, 2).eval()
    nn.init.zeros_(block.bn2.weight)
    x = torch.rand(1, 4, 6, 6)
    y = block(x)
    assert torch.equal(y[:, 2:6], x[:, :, ::2, ::2]) and not y[:, :2].any() and not y[:, 6:].any()


def test_pictures_are_read_once_and_split_by_class(archive, tmp_path, monkeypatch):
    monkeypatch.setattr(cifar_resnet, "VALIDATION", 4)
    pictures = read(archive, tmp_path / "cache")
    assert pictures.pixels.shape == (160, 3, 32, 32) and pictures.pixels.dtype == torch.uint8
    assert torch.equal(pictures.labels, torch.arange(10).repeat_interleave(EACH))
    assert abs(pictures.pixels[EACH, 0].float().mean() - 44) < 3  # red of the second class
    archive.unlink()
    again = read(archive, tmp_path / "cache")
    assert torch.equal(again.pixels, pictures.pixels)
    training, held = split(pictures)
    assert torch.equal(torch.bincount(held.labels), torch.full((10,), 4)) and len(training) == 120
    other = split(again)[1]
    assert torch.equal(held.pixels, other.pixels)
    both = torch.cat([training.pixels, held.pixels]).flatten(1)
    assert len(both.unique(dim=0)) == len(pictures.pixels.flatten(1).unique(dim=0))


def test_augmentation_moves_and_mirrors():
    pixels = torch.randint(0, 256, (40, 3, 8, 6), dtype=torch.uint8)
    found = augmented(pixels, torch.Generator().manual_seed(0))
    padded = nn.functional.pad(pixels, (4, 4, 4, 4))
    places = set()
    for picture, wide in zip(found, padded, strict=True):
        (place,) = {
            (row, column, mirrored)
            for row in range(9)
            for column in range(9)
            for mirrored in (False, True)
            if torch.equal(picture, _flipped(wide[:, row : row + 8, column : column + 6], mirrored))
        }
        places.add(place)
    assert len(places) > 20 and len({mirrored for *_, mirrored in places}) == 2


def _flipped(picture, mirrored):
    return picture.flip(2) if mirrored else picture


def test_an_epoch_shows_every_picture_once():
    data = Pictures(torch.zeros(10, 3, 4, 4, dtype=torch.uint8), torch.arange(10))
    shown = [labels for _, labels in batches(data, 3, 2, seed=0)]
    assert len(shown) == 6 and len(torch.cat(shown[:3]).unique()) == 9
    x = next(batches(data, 3, 1, seed=0))[0]
    assert x.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(
        normalised(torch.full((1, 3, 1, 1), 255, dtype=torch.uint8))[0, 0, 0, 0].item(),
        2.2489,
        rtol=0,
        atol=1e-3,
    )


def test_from_archive_to_page(archive, weights, tmp_path, monkeypatch):
    monkeypatch.setattr(cifar_resnet, "VALIDATION", 4)
    monkeypatch.setattr(
        bench_resnet, "race", lambda calls, *_: Times({"dense": 2.0, "sparse": 1.0}, "cpu", 1)
    )
    options = [
        "--pictures", archive, "--weights", weights, "--out", tmp_path / "out", "--cache", tmp_path / "cache",
        "--models", "resnet20", "--blocks", "8x8", "--sparsities", "0.5", "--masks", "each,shared", "--seeds", "1",
        "--epochs", "2", "--dense-epochs", "1", "--batch", "20", "--device", "cpu",
    ]  # fmt: skip
    bench_resnet.main([str(option) for option in options])
    report = json.loads((tmp_path / "out" / "resnet-cifar10.json").read_text())
    dense, *sparse = report["rows"]
    assert dense["form"] == "dense" and dense["density"] == 1.0
    assert {row["masks"] for row in sparse} == {"each", "shared"}
    for row in sparse:
        assert row["density"] == pytest.approx(0.5, abs=0.01) and row["bytes"] < 0.65 * dense["bytes"]
        assert row["before"] == dense["before"]  # the same dense network
        assert row["time"] == 0.5
    bench_resnet.main([str(option) for option in options])  # everything is there
    assert json.loads((tmp_path / "out" / "resnet-cifar10.json").read_text())["rows"] == report["rows"]
    page = (tmp_path / "out" / "resnet-cifar10.md").read_text()
    lost = dense["accuracy"] - sparse[0]["accuracy"]
    assert (
        f"| resnet20 | 8x8 | 50% | each | 1 | {dense['accuracy']:.2f} | {sparse[0]['accuracy']:.2f} | {lost:.2f} |"
        in page
    )


def test_a_missed_goal_is_said():
    common = {"model": "resnet20", "bytes": 10}
    rows = [common | {"form": "dense", "seed": seed, "accuracy": 90.0 + seed} for seed in range(2)]
    settings = {"form": "sparse", "block": "8x8", "sparsity": 0.75, "masks": "each"}
    rows += [common | settings | {"seed": seed, "accuracy": 89.0 - seed, "bytes": 4} for seed in range(2)]
    (one,) = bench_resnet.summary(rows)
    assert (one["lost"], one["most"], one["goal"], one["bytes"], one["time"]) == (2.0, 3.0, 2.0, 0.4, None)
    environment = {"gpu": [], "versions": {"torch": "2"}}
    assert "2.0 |" in bench_resnet.page({"rows": rows, "environment": environment, "command": "x"})
    rows[-1]["accuracy"] -= 1
    assert "2.0 missed |" in bench_resnet.page({"rows": rows, "environment": environment, "command": "x"})
