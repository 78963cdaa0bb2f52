"""A benchmark that tells winners from losers, and keeps silent where outputs are wrong."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

import sparsify
from sparsify.bench import agreement, timing, verdict
from sparsify.bench import checkpoint as bench_checkpoint
from sparsify.bench import layers as bench_layers
from sparsify.bench import model as bench_model
from sparsify.bench.checkpoint import bench, token_counts
from sparsify.checkpoint.densify import dense_skeleton
from sparsify.errors import ConfigError, SparsifyError
from sparsify.layers.linear import BlockSparseLinear
from sparsify.layers.swap import sparse_modules
from tests.architectures.zoo import BY_NAME

CPU = torch.device("cpu")


def sparse_model(name: str, sparsity: float = 0.5, scope: str = "layer"):
    model = BY_NAME[name].build()
    sparsify.prune(model, block=BY_NAME[name].block, sparsity=sparsity, scope=scope)
    return model


class Clock:
    """A clock that only calls move."""

    def __init__(self, monkeypatch):
        self.now, self.order = 0.0, []
        monkeypatch.setattr(timing.time, "perf_counter", lambda: self.now)

    def call(self, name: str, *seconds: float):
        left = list(seconds)

        def run():
            self.order.append(name)
            self.now += left.pop(0) if len(left) > 1 else left[0]
            assert not torch.is_grad_enabled()

        return run


def test_race_takes_turns_and_the_median(monkeypatch):
    clock = Clock(monkeypatch)
    warm = [9.0] * timing.WARMUP
    calls = {"a": clock.call("a", *warm, 0.1, 0.9, 0.1, 0.1), "b": clock.call("b", *warm, 0.2)}
    times = timing.race(calls, CPU, 3)
    assert times.seconds == pytest.approx({"a": 0.1, "b": 0.2})
    assert (times.timing, times.rounds) == ("cpu", 3)
    assert clock.order[-6:] == ["a", "b"] * 3


def test_a_long_race_ends_early_but_not_before_five_rounds(monkeypatch):
    clock = Clock(monkeypatch)
    assert timing.race({"slow": clock.call("slow", 10.0)}, CPU, 20).rounds == timing.FEWEST_ROUNDS
    assert timing.race({"slow": clock.call("slow", 10.0)}, CPU, 2).rounds == 2
    assert timing.race({"fast": clock.call("fast", 1e-4)}, CPU, 20).rounds == 20


@pytest.mark.parametrize(
    ("damage", "caught"),
    [
        pytest.param(lambda y: y, False, id="right"),
        pytest.param(lambda y: y * 1.001, True, id="scaled"),
        pytest.param(lambda y: y.index_put((torch.tensor(7), torch.tensor(3)), y[7, 4]), True, id="one-element"),
        pytest.param(lambda y: y.index_put((torch.tensor(7), torch.tensor(3)), torch.tensor(float("nan"))), True,
                     id="nan"),
    ],
)  # fmt: skip
def test_one_wrong_element_is_enough(damage, caught):
    exact = torch.randn(500, 400, dtype=torch.float64)
    actual = damage(exact.float())
    arguments = ("layer", actual, exact, exact.square().mean(0).sqrt(), agreement.LAYER[torch.float32])
    if caught:
        with pytest.raises(SparsifyError, match=r"layer at 500 tokens differs .* nothing is reported"):
            agreement.check_layer(*arguments)
    else:
        assert agreement.check_layer(*arguments) < 1e-6


def test_an_output_without_weights_must_be_exactly_zero():
    exact = torch.zeros(2, 3, dtype=torch.float64)
    assert agreement.check_layer("layer", torch.zeros(2, 3), exact, exact[0], 1e-5) == 0
    with pytest.raises(SparsifyError):
        agreement.check_layer("layer", torch.full((2, 3), 1e-9), exact, exact[0], 1e-5)


def test_routed_models_may_differ_in_few_tokens():
    expected = torch.randn(1, 9, 5)
    actual = expected.clone()
    actual[0, 2] += 1
    assert agreement.check_model(actual, expected, routed=True) == 0
    with pytest.raises(SparsifyError, match="output at 9 tokens differs"):
        agreement.check_model(actual, expected, routed=False)
    with pytest.raises(SparsifyError):
        agreement.check_model(torch.full_like(expected, float("nan")), expected, routed=True)


def test_equal_layers_are_measured_once_and_counted():
    found = {group.name.rsplit(".", 1)[1]: group for group in bench_layers.groups(sparse_model("llama"))}
    assert sum(len(group.names) for group in found.values()) == 14
    shapes = sorted((tuple(g.describe()["shapes"][0]), len(g.names)) for g in found.values())
    assert shapes == [((64, 192), 4), ((192, 192), 4), ((192, 344), 2), ((344, 192), 4)]


def test_layers_of_other_density_or_bias_are_apart():
    layers = [
        BlockSparseLinear(64, 64, 16, torch.arange(16).view(4, 4) < kept, bias=bias)
        for kept, bias in ((4, True), (4, True), (12, True), (4, False))
    ]
    found = bench_layers.groups(nn.Sequential(*layers))
    assert [(group.names, group.density) for group in found] == [
        (["0", "1"], 0.25),
        (["2"], 0.75),
        (["3"], 0.25),
    ]


def test_bytes_are_those_in_memory():
    layer = BlockSparseLinear(64, 48, 16, torch.arange(12).view(3, 4) < 5, bias=False, dtype=torch.bfloat16)
    entry = bench_layers.groups(nn.Sequential(layer))[0].describe()
    assert entry["bytes_dense"] == 48 * 64 * 2
    assert entry["bytes"] == 5 * 256 * 2 + sum(buffer.nbytes for buffer in layer.buffers())
    assert (entry["block"], entry["dtype"], entry["shapes"]) == ("16x16", "bfloat16", [[48, 64]])


@pytest.mark.parametrize("name", ["bert", "gpt2", "mixtral", "qwen3-moe"])
def test_every_kind_of_layer_is_timed_and_right(name):
    model = sparse_model(name)
    skeleton = dense_skeleton(model)
    seen = []
    for group in bench_layers.groups(model):
        rows = bench_layers.measure_group(group, skeleton, [5, 1], 1, lambda: seen.append(1))
        assert [row["tokens"] for row in rows] == [1, 5]
        for row in rows:
            assert row["speedup"] == pytest.approx(row["dense_us"] / row["sparse_us"])
            assert 0 <= row["error"] < 4e-5
            assert row["timing"] == "cpu"
    assert len(seen) == 2 * len(bench_layers.groups(model))


def test_the_dense_layer_is_random_and_of_the_models_own_kind(monkeypatch):
    model = sparse_model("gpt2", 0.75)
    raced = []

    def race(calls, device, repeats):
        raced.append([call.__closure__ for call in calls.values()])
        return timing.Times(dict.fromkeys(calls, 1.0), "cpu", 1)

    monkeypatch.setattr(bench_layers, "race", race)
    group = bench_layers.groups(model)[0]
    before = group.module.weight.clone()
    bench_layers.measure_group(group, dense_skeleton(model), [3], 1, lambda: None)
    layers = next(cell.cell_contents for cell in raced[0][0] if isinstance(cell.cell_contents, list))
    assert type(layers[0]).__name__ == "Conv1D" and not (layers[0].weight == 0).any()
    assert torch.equal(group.module.weight, before)


def test_the_twin_shares_all_that_is_not_packed_and_gives_the_same():
    model = sparse_model("llama")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    twin = bench_model.dense_twin(model)
    assert not sparse_modules(twin) and len(sparse_modules(model)) == 14
    assert twin.model.embed_tokens.weight is model.model.embed_tokens.weight
    assert max(bench_model.check(model, twin, [1, 9]).values()) < 1e-4
    names = {name: list(module.packed) for name, module in sparse_modules(model).items()}
    bench_model.fill_zeros(twin, names)
    assert not any((twin.get_submodule(name).weight == 0).any() for name in names)
    assert twin.model.layers[0].mlp.up_proj.weight.std() < 1
    after = model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    with pytest.raises(SparsifyError, match="nothing is reported"):
        bench_model.check(model, twin, [9])


def test_a_model_says_which_token_counts_it_takes():
    assert bench_model.usable_counts(BY_NAME["llama"].build(), [4, 128, 129]) == (
        [4, 128],
        ["end to end is not timed at 129 tokens: the model takes 128"],
    )
    usable, why = bench_model.usable_counts(BY_NAME["vit"].build(), [4])
    assert usable == [] and "ViTForImageClassification takes no tokens" in why[0]


def row(tokens: int, speedup: float, how: str = "cpu"):
    return {"tokens": tokens, "speedup": speedup, "timing": how, "dense_us": speedup * 10, "sparse_us": 10.0}


def test_the_closing_sentence_counts_layers_not_groups():
    groups = [
        {"names": ["a"] * 12, "times": [row(1, 0.5), row(256, 3.0)]},
        {"names": ["b", "c"], "times": [row(1, 0.9), row(256, 1.01)]},
    ]
    assert verdict.closing(groups, {"times": [row(1, 0.7), row(256, 2.0)]}) == (
        "At 1 token 14 of 14 layers are slower sparse than dense; "
        "at 256 tokens 12 of 14 layers are faster sparse than dense, 2 are as fast as dense; "
        "the whole model has 0.70x at 1 token and 2.00x at 256 tokens the speed of the dense one."
    )
    assert "14 layers lose" in (verdict.advice(groups) or "")
    both = {"times": [row(1, 1.5, "graph"), row(1, 0.9, "eager")]}
    assert "1.50x at 1 token (CUDA graph) and 0.90x at 1 token (eager)" in verdict.closing([], both)
    assert verdict.advice([{"names": ["a"], "times": [row(1, 1.5)]}]) is None


def test_losing_rows_are_marked():
    common = {"name": "a", "names": ["a"], "shapes": [[8, 16]], "block": "8x8", "density": 0.5, "bytes": 1}
    group = common | {"bytes_dense": 2, "times": [row(1, 0.5), row(16, 2.0)], "skipped": None}
    header, rows = verdict.layer_table([group])
    assert [cells[-2:] for cells in rows] == [["0.50x", "slower than dense"], ["2.00x", ""]]
    assert all(len(cells) == len(header) for cells in rows)
    skipped = verdict.layer_table([group | {"times": [], "skipped": "not timed: x"}])[1]
    assert [len(skipped[0]), skipped[0][-1]] == [len(header), "not timed: x"]


@pytest.mark.parametrize("tokens", ["", "0", "1,-2", "1;2", "many", "1.5", [0], []])
def test_token_counts_that_are_none(tokens):
    with pytest.raises(ConfigError, match="expected positive whole numbers"):
        token_counts(tokens, CPU)


def test_token_counts():
    assert token_counts("256, 1,16,1", CPU) == [1, 16, 256]
    assert token_counts(None, CPU) == [1, 16, 128]
    assert token_counts(None, torch.device("cuda")) == [1, 16, 256, 2048]


def test_too_little_memory_leaves_out_the_whole_model_and_says_so(tmp_path, monkeypatch):
    sparsify.save(sparse_model("llama"), tmp_path / "sparse")
    monkeypatch.setattr(bench_checkpoint, "_free_bytes", lambda device: 1000)
    report = bench(tmp_path / "sparse", tokens=[2], repeats=1, device="cpu")
    assert report["end_to_end"] is None and report["layers"][0]["times"]
    assert "end to end is not timed: the dense model needs" in report["notes"][-1]


def test_a_busy_machine_is_told(monkeypatch):
    monkeypatch.setattr(bench_checkpoint.os, "cpu_count", lambda: 2)
    monkeypatch.setattr(bench_checkpoint.os, "getloadavg", lambda: (4.9, 0, 0))
    assert "the machine was busy (load 4.9 on 2 cores" in bench_checkpoint.busy(CPU)[0]
    assert bench_checkpoint.busy(torch.device("cuda")) == []
    monkeypatch.setattr(bench_checkpoint.os, "getloadavg", lambda: (0.3, 0, 0))
    assert bench_checkpoint.busy(CPU) == []


def test_experts_without_a_known_routing_are_skipped_with_a_reason():
    group = bench_layers.groups(sparse_model("mixtral"))
    experts = next(one for one in group if one.kind == "experts")
    skeleton = SimpleNamespace(config=SimpleNamespace())
    assert "does not say how many experts" in (bench_checkpoint._why_skipped(experts, skeleton) or "")
    assert bench_layers.experts_per_token(BY_NAME["mixtral"].build()) == 2


@pytest.mark.gpu
def test_a_gpu_race_replays_graphs_unless_somebody_waits():
    gpu = torch.device("cuda")
    x = torch.randn(512, 512, device=gpu)
    small, large = (lambda: x @ x), (lambda: [x @ x for _ in range(20)])
    times = timing.race({"small": small, "large": large}, gpu, 10)
    assert times.timing == "graph" and times.seconds["large"] > 3 * times.seconds["small"]
    stream = torch.cuda.current_stream()
    assert timing.race({"small": small, "waits": lambda: x.sum().item()}, gpu, 5).timing == "eager"
    assert torch.cuda.current_stream() == stream
    assert timing.race({"small": small}, gpu, 5).timing == "graph"


@pytest.mark.gpu
@pytest.mark.parametrize(("name", "ways"), [("llama", ["graph", "eager"]), ("mixtral", ["eager"])])
def test_a_gpu_bench_is_right_and_says_how_it_timed(name, ways, tmp_path):
    sparsify.save(sparse_model(name), tmp_path / "sparse")
    report = bench(tmp_path / "sparse", tokens=[1, 64], repeats=5, device="cuda", dtype="bfloat16")
    assert report["gpu"] == torch.cuda.get_device_name()
    linear = [row for group in report["layers"] if group["kind"] == "linear" for row in group["times"]]
    assert {row["timing"] for row in linear} == {"graph"}
    assert [row["timing"] for row in report["end_to_end"]["times"]] == ways * 2
