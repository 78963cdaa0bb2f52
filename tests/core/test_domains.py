"""Recipes of plain modules in three domains, and the benchmark of all domains, on data made here."""

from __future__ import annotations

import json
import math
import sys
import wave
from datetime import datetime, timedelta
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

import bench_domains
import domain_classifiers
import sparsify
from sparsify import BlockSparseEmbedding
from sparsify.errors import DataError
from sparsify.layers.swap import sparse_modules
from sparsify.recipes import anomaly_detection, plain_modules, sequential_recommender
from sparsify.recipes.anomaly_detection import AnomalyDetection
from sparsify.recipes.keyword_spotting import KeywordSpotting, KeywordTransformer
from sparsify.recipes.plain_modules import Length
from sparsify.recipes.sequential_recommender import SasRec, SequentialRecommender

START = datetime(2020, 1, 1)
ITEMS = 40


def time_of(minute: int) -> str:
    return str(START + timedelta(minutes=minute))


@pytest.fixture(scope="module")
def nab(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Waves; in each second half values jump about for a while, which a window says."""
    folder = tmp_path_factory.mktemp("nab")
    (folder / "labels").mkdir()
    windows = {}
    generator = np.random.default_rng(0)
    for number in range(3):
        values = np.sin(np.arange(1600) / (4 + number)) * 3 + 10
        for start in (400, 1200):
            values[start : start + 32] += generator.normal(0, 8, 32)
        file = folder / "data" / "some" / f"{number}.csv"
        file.parent.mkdir(parents=True, exist_ok=True)
        rows = [f"{time_of(minute)},{value}" for minute, value in enumerate(values)]
        file.write_text("\n".join(["timestamp,value", *rows]))
        windows[f"some/{number}.csv"] = [
            [f"{time_of(start)}.000000", f"{time_of(start + 31)}.000000"] for start in (400, 1200)
        ]
    (folder / "labels" / "combined_windows.json").write_text(json.dumps(windows))
    return folder


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Users who walk through the items in one order, from anywhere; ids with gaps, rare ones first."""
    file = tmp_path_factory.mktemp("log") / "log.txt"
    generator = np.random.default_rng(0)
    lines = []
    for user in range(1, 300):
        start, steps = generator.integers(ITEMS), generator.integers(5, 12)
        lines += [(step, f"{user} {3 * ((start + step) % ITEMS) + 1}") for step in range(steps)]
    lines.sort(key=lambda line: line[0])  # in time order, users mixed
    file.write_text("".join(f"{line}\n" for _, line in lines))
    return file


@pytest.fixture(scope="module")
def keywords(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small keyword transformer, and two words of three speakers: a high and a low note."""
    folder = tmp_path_factory.mktemp("keywords")
    torch.manual_seed(0)
    state = KeywordTransformer(12, width=16, layers=2).state_dict()
    for name in [name for name in state if name.startswith("frontend.")]:
        state[name] = torch.rand(state[name].shape) - (0.5 if "d" in name else 0)
    save_file(state, folder / "kwt1.safetensors")
    (folder / "recordings").mkdir()
    for index in range(24):
        word, speaker = ("high", "low")[index % 2], "abc"[index // 2 % 3]
        times = np.arange(3000 + 100 * index) / 8000
        sound = np.sin(2 * np.pi * (1500 if word == "high" else 200) * times) * 20000
        with wave.open(str(folder / "recordings" / f"{word}_{speaker}_{index}.wav"), "wb") as stream:
            stream.setnchannels(1)
            stream.setsampwidth(2)
            stream.setframerate(8000)
            stream.writeframes(sound.astype("<i2").tobytes())
    return folder


def test_series_are_standardised_by_their_first_half(nab: Path) -> None:
    series = anomaly_detection.read_series(nab)
    assert len(series) == 3
    one = series[0]
    assert one.split == 800 and one.unusual.nonzero().flatten().tolist() == [
        *range(400, 432),
        *range(1200, 1232),
    ]
    assert abs(one.values[:800].mean()) < 0.05 and 0.5 < one.values[:800].std() < 1.1


def test_average_precision_and_alarms_are_those_by_hand() -> None:
    score = torch.tensor([0.9, 0.8, 0.7, 0.6, 0.5])
    positive = torch.tensor([True, False, True, False, False])
    assert anomaly_detection.average_precision(score, positive) == pytest.approx((1 + 2 / 3) / 2)
    assert anomaly_detection.average_precision(torch.ones(5), positive) == pytest.approx(0.4)
    score = torch.tensor([0, 5, 5, 0, 5, 0, 0, 5, 0.0])
    unusual = torch.tensor([0, 0, 1, 1, 0, 0, 1, 0, 0]).bool()
    judged = [(score, unusual, torch.zeros(9, dtype=torch.bool))]
    found = anomaly_detection.alarms(judged, 1.0, train=False)
    assert found["precision"] == pytest.approx(1 / 3) and found["recall"] == pytest.approx(1 / 2)
    assert anomaly_detection.alarms(judged, 1.0, train=True)["recall"] == 0


def test_a_pruned_forecaster_finds_what_is_unusual(nab: Path, tmp_path: Path) -> None:
    domain = AnomalyDetection(nab, width=64)
    domain.dense = domain.sparse = Length(120, 3e-3)
    untrained = domain.evaluate(domain.network().eval())
    dense = plain_modules.train_dense(domain)
    before = {name: tensor.clone() for name, tensor in dense.state_dict().items()}
    sparse = plain_modules.compress(domain, dense, "16x16", 0.5)
    assert all(torch.equal(tensor, before[name]) for name, tensor in dense.state_dict().items())
    assert set(sparse_modules(sparse)) == {"body.0", "body.2", "body.4"}
    for network in (dense, sparse):
        found = domain.evaluate(network)
        assert found["average_precision"] > max(0.8, untrained["average_precision"]) > found["positives"]
        assert found["recall"] == 1.0
    cost = plain_modules.costs(domain, dense, sparse, tmp_path)
    assert cost["sparse"]["bytes"] < 0.62 * cost["dense"]["bytes"]
    again = sparsify.load(tmp_path / "sparse", model=domain.network())
    assert domain.evaluate(again) == domain.evaluate(sparse)


def test_items_are_numbered_by_how_often_training_has_them(tmp_path: Path) -> None:
    file = tmp_path / "log.txt"
    file.write_text("7 100\n9 5\n7 5\n9 5\n9 100\n7 100\n9 3\n8 3\n7 3\n9 8\n")
    histories, items = sequential_recommender.read_log(file)
    # Training parts: 100 5 of user 7; 5 5 100 of user 9; user 8 has too few.
    assert items == 4 and [history.tolist() for history in histories] == [[2, 1, 2, 3], [1, 1, 2, 3, 4]]


def test_recommendations_are_ranked_among_items_not_seen(tmp_path: Path) -> None:
    file = tmp_path / "log.txt"
    file.write_text(
        "".join(f"1 {item}\n" for item in (1, 2, 3, 4)) + "".join(f"2 {i}\n" for i in (4, 3, 1, 2))
    )
    domain = SequentialRecommender(file)
    seen = []

    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scores = nn.Parameter(torch.tensor([9.0, 5.0, 4.0, 3.0, 2.0]))

        def forward(self, history: Tensor) -> Tensor:
            seen.append(history.tolist())
            return self.scores.expand(len(history), -1).clone()

    last = [int(history[-1]) for history in domain.histories]
    ranks = [
        1 + sum(item < own and item not in history[:-1] for item in range(1, 5))
        for own, history in zip(last, domain.histories, strict=True)
    ]
    found = domain.evaluate(Fixed())
    assert found["hr@10"] == 1
    assert found["ndcg@10"] == pytest.approx(np.mean([1 / math.log2(1 + rank) for rank in ranks]))
    assert seen == [[history[:-1].tolist() for history in domain.histories]]
    domain.evaluate(Fixed(), "validation")
    assert seen[1] == [history[:-2].tolist() for history in domain.histories]


def test_the_sampled_loss_is_the_whole_softmax_where_all_items_are_drawn(log: Path) -> None:
    torch.manual_seed(0)
    domain = SequentialRecommender(log, width=16)
    assert domain.items == ITEMS
    network = domain.network().eval()
    history = torch.tensor([[1, 2, 3], [4, 5, 0]])
    following = torch.tensor([[2, 3, 4], [5, 6, 0]])
    drawn = torch.arange(1, ITEMS + 1)
    valid = following != 0
    assert isinstance(network, SasRec)
    scores = network.items(network.states(history)[valid])[:, 1:]
    expected = functional.cross_entropy(scores, following[valid] - 1)
    assert torch.allclose(domain.loss(network, (history, following, drawn), None), expected, rtol=1e-5)
    # Padding behind a history changes nothing, and the last item is what counts.
    assert torch.allclose(network(history)[1], network(history[1:, :2])[0], atol=1e-5)


def test_a_recommender_with_a_sparse_table_learns_and_is_kept(
    log: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sequential_recommender, "CANDIDATES", 32)
    domain = SequentialRecommender(log, width=32)
    domain.dense = domain.sparse = Length(60, 1e-2)
    dense = plain_modules.train_dense(domain)
    sparse = plain_modules.compress(domain, dense, "8x16", 0.5)
    assert isinstance(sparse.items, BlockSparseEmbedding) and abs(sparse.items.density - 0.5) < 0.05
    for network in (dense, sparse):
        assert domain.evaluate(network)["hr@10"] > 0.6 > 2 * 10 / ITEMS
    sparsify.save(sparse, tmp_path / "sparse")
    again = sparsify.load(tmp_path / "sparse", model=domain.network())
    assert domain.evaluate(again) == domain.evaluate(sparse)


def test_no_speaker_is_in_training_and_test(keywords: Path) -> None:
    heard = []
    for fold in range(3):
        domain = KeywordSpotting(keywords, fold)
        assert (len(domain.train[1]), len(domain.test[1])) == (16, 8) and domain.words == ["high", "low"]
        train, test = ({tuple(sound.tolist()) for sound in part[0]} for part in (domain.train, domain.test))
        assert not train & test
        heard.append(test)
        judged = KeywordSpotting(keywords, fold, validate=True)
        validation = {tuple(sound.tolist()) for sound in judged.test[0]}
        assert not validation & test and not validation & {tuple(s.tolist()) for s in judged.train[0]}
        assert len(judged.train[1]) == 8 and validation <= train
    assert len(set.union(*heard)) == 24


def test_a_pretrained_keyword_transformer_is_tuned_and_pruned(keywords: Path, tmp_path: Path) -> None:
    domain = KeywordSpotting(keywords)
    domain.dense = domain.sparse = Length(4, 1e-3)
    network = domain.network()
    assert isinstance(network, KeywordTransformer) and len(network.blocks) == 2
    stored = load_file(keywords / "kwt1.safetensors")
    assert all(
        torch.equal(network.state_dict()[k], v) for k, v in stored.items() if not k.startswith("head.")
    )
    dense = plain_modules.train_dense(domain)
    assert torch.equal(dense.state_dict()["frontend.mel"], stored["frontend.mel"])
    sparse = plain_modules.compress(domain, dense, "8x8", 0.5)
    assert len(sparse_modules(sparse)) == 2 * 6
    plain_modules.costs(domain, dense, sparse, tmp_path)
    again = sparsify.load(tmp_path / "sparse", model=domain.network())
    assert torch.equal(again(domain.test[0]), sparse(domain.test[0]))
    assert 0 <= domain.evaluate(again)["accuracy"] <= 1


@pytest.mark.parametrize(
    ("make", "message"),
    [
        pytest.param(AnomalyDetection, "cannot read anomaly windows", id="anomaly"),
        pytest.param(SequentialRecommender, "cannot read interactions", id="recommender"),
        pytest.param(KeywordSpotting, "there are no weights", id="keywords"),
    ],
)
def test_missing_data_is_told(make: type, message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=message):
        make(tmp_path)


@pytest.mark.parametrize("content", ["1 2 3\n", "1 0\n", "a b\n", "1 2\n1 3\n", ""], ids=repr)
def test_a_file_that_is_no_log_is_told(content: str, tmp_path: Path) -> None:
    (tmp_path / "log.txt").write_text(content)
    with pytest.raises(DataError, match=r"log\.txt"):
        SequentialRecommender(tmp_path / "log.txt")


def test_a_recipe_of_a_plain_module_is_a_command(
    log: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(SequentialRecommender, "dense", Length(3, 1e-3))
    monkeypatch.setattr(SequentialRecommender, "sparse", Length(3, 1e-3))
    settings = ["--out", str(tmp_path / "out"), "--block", "8x16", "--sparsity", "0.6", "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", ["recipe", str(log), *settings])
    plain_modules.command(SequentialRecommender, "", 0.75, "16x16")
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert (report["block"], report["sparsity"]) == ("8x16", 0.6)
    assert report["sparse"]["bytes"] < report["dense"]["bytes"]
    assert capsys.readouterr().out.count("ndcg@10") == 2
    monkeypatch.setattr(sys, "argv", ["recipe", str(tmp_path / "none"), *settings])
    with pytest.raises(SystemExit) as left:
        plain_modules.command(SequentialRecommender, "", 0.75, "16x16")
    assert left.value.code == 2 and capsys.readouterr().err.startswith("error: cannot read interactions")


def run_bench(monkeypatch: pytest.MonkeyPatch, out: Path, *settings: str) -> dict:
    monkeypatch.setattr(sys, "argv", ["bench_domains.py", "--out", str(out), "--device", "cpu", *settings])
    bench_domains.main()
    return json.loads((out / "domains.json").read_text())


def test_bench_rows_are_kept_and_become_a_page(
    nab: Path, log: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench_domains, "SEEDS", 2)
    monkeypatch.setattr(sequential_recommender, "CANDIDATES", 32)
    monkeypatch.setattr(bench_domains, "AnomalyDetection", lambda folder: AnomalyDetection(folder, 64))
    data = ("--nab", str(nab), "--interactions", str(log), "--scale", "0.001")
    report = run_bench(monkeypatch, tmp_path, *data, "--only", r"(anomaly|recommendation) 16x16 0.75")
    assert [(row["domain"], row["seed"]) for row in report["rows"]] == [
        ("anomaly", 0), ("anomaly", 1), ("recommendation", 0), ("recommendation", 1)
    ]  # fmt: skip
    for row in report["rows"]:
        assert (
            set(row["quality"]) == {"dense", "dense_longer", "sparse"}
            and row["metric"] in row["quality"]["sparse"]
        )
        assert row["costs"]["sparse"]["bytes"] < row["costs"]["dense"]["bytes"]
    again = run_bench(monkeypatch, tmp_path, *data, "--only", r"anomaly 16x16 0.75|anomaly 64x64 0.5 0")
    assert [row for row in again["rows"] if row["block"] == "16x16"] == report["rows"] and len(
        again["rows"]
    ) == 5
    page = (tmp_path / "domains.md").read_text()
    assert page.count("| 16x16 | 75% |") == 2 and "| 64x64 | 50% |" in page and "KWT-1" not in page


def test_bench_times_an_encoder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_domains, "ENCODERS", {"cpu": (64, 1, 2)})
    rows = run_bench(
        monkeypatch, tmp_path, "--only", "whisper-encoder 64x64 0.75", "--repeats", "1", "--busy"
    )["rows"]
    assert len(rows) == 1 and not rows[0]["quality"]
    dense, sparse = rows[0]["costs"]["dense"], rows[0]["costs"]["sparse"]
    # Four projections of attention, and two layers of the MLP, of 64 x 64 blocks: a quarter of 12 is left.
    assert dense["parameters"] - sparse["parameters"] == 9 * 64 * 64
    page = (tmp_path / "domains.md").read_text()
    assert "| 64x64 | 75% |" in page and "times are rough" in page


@pytest.mark.slow
@pytest.mark.parametrize("domain", ["speech", "images"])
def test_bench_runs_the_packages_own_recipes(
    domain: str, keywords: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench_domains, "SEEDS", 1)
    mnist = tmp_path / "mnist"
    mnist.mkdir()
    save_digits(mnist)
    data = ("--keywords", str(keywords), "--mnist", str(mnist), "--scale", "0.002")
    rows = run_bench(monkeypatch, tmp_path, *data, "--only", f"{domain} 16x16 0.75")["rows"]
    assert len(rows) == 1 and 0 <= rows[0]["quality"]["sparse"]["accuracy"] <= 1
    assert rows[0]["costs"]["sparse"]["bytes"] < 0.6 * rows[0]["costs"]["dense"]["bytes"]
    assert "| 16x16 | 75% |" in (tmp_path / "domains.md").read_text()


def save_digits(folder: Path) -> None:
    """Forty pictures with labels, in MNIST's files."""
    import lzma

    generator = np.random.default_rng(0)
    for part in ("train", "t10k"):
        pixels = generator.integers(0, 255, (40, 28, 28), np.uint8)
        for name, array in (("images-idx3", pixels), ("labels-idx1", np.arange(40, dtype=np.uint8) % 10)):
            head = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">i4").tobytes()
            (folder / f"{part}-{name}-ubyte.xz").write_bytes(lzma.compress(head + array.tobytes()))
    pictures = domain_classifiers._idx(folder, "t10k-images-idx3-ubyte")
    assert np.array_equal(pictures, pixels)
