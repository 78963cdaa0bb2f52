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
from sparsify.bench.limits import Limits, flops_of, weight_bytes
from sparsify.bench.workloads import Workload, workloads
from sparsify.checkpoint.densify import dense_skeleton
from sparsify.errors import ConfigError, SparsifyError
from sparsify.layers.convolution import BlockSparseConv2d
from sparsify.layers.linear import BlockSparseLinear
from sparsify.layers.swap import sparse_modules
from tests.architectures.zoo import BY_NAME

CPU = torch.device("cpu")
LIMITS = Limits(flops=1e11, bytes=1e10)


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
        rows = bench_layers.measure_group(group, skeleton, [5, 1], 1, lambda: seen.append(1), LIMITS)
        assert [row["tokens"] for row in rows] == [1, 5]
        for row in rows:
            assert row["speedup"] == pytest.approx(row["dense_us"] / row["sparse_us"])
            assert row["dense_share"] == pytest.approx(row["dense_limit_us"] / row["dense_us"])
            assert 0.3 < row["sparse_limit_us"] / row["dense_limit_us"] < 0.9
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
    bench_layers.measure_group(group, dense_skeleton(model), [3], 1, lambda: None, LIMITS)
    layers = next(cell.cell_contents for cell in raced[0][0] if isinstance(cell.cell_contents, list))
    assert type(layers[0]).__name__ == "Conv1D" and not (layers[0].weight == 0).any()
    assert torch.equal(group.module.weight, before)


def test_the_twin_shares_all_that_is_not_packed_and_gives_the_same():
    model = sparse_model("llama")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    twin = bench_model.dense_twin(model)
    assert not sparse_modules(twin) and len(sparse_modules(model)) == 14
    assert twin.model.embed_tokens.weight is model.model.embed_tokens.weight
    works = [Workload("prefill", 1, 9), Workload("prefill", 2, 4), Workload("decode", 2, 5)]
    assert max(bench_model.check(model, twin, works)) < 1e-4
    names = {name: list(module.packed) for name, module in sparse_modules(model).items()}
    bench_model.fill_zeros(twin, names)
    assert not any((twin.get_submodule(name).weight == 0).any() for name in names)
    assert twin.model.layers[0].mlp.up_proj.weight.std() < 1
    after = model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    for work in works:
        with pytest.raises(SparsifyError, match=f"output at {work} differs .* nothing is reported"):
            bench_model.check(model, twin, [work])


def test_a_model_says_which_workloads_it_takes():
    llama = BY_NAME["llama"].build()
    found, notes = workloads(llama, "causal-lm", [128, 4, 129], [2, 1])
    assert found == [
        *(Workload("prefill", batch, tokens) for batch in (1, 2) for tokens in (4, 128)),
        *(Workload("decode", batch, 4) for batch in (1, 2)),  # at 128 there is no room for one more
    ]
    assert notes == ["end to end is not timed at 129 tokens: the model takes 128"]
    assert workloads(BY_NAME["bert"].build(), "masked-lm", [4])[0] == [Workload("forward", 1, 4)]
    vit = BY_NAME["vit"].build()
    found, notes = workloads(vit, None, [4])
    assert found == [] and "ViTForImageClassification takes no tokens" in notes[0]
    sample = {"pixel_values": torch.zeros(1, 3, vit.config.image_size, vit.config.image_size)}
    patches = (vit.config.image_size // vit.config.patch_size) ** 2
    found, notes = workloads(vit, None, [4], [3], sample)
    assert (found, notes) == ([Workload("forward", 3, patches + 1, "sample")], [])
    task = found[0].on(vit)
    assert task.output().shape == (3, vit.config.num_labels) and task.units == 3
    llama._can_compile_fullgraph = False
    assert workloads(llama, "causal-lm", [4])[1] == [
        "decoding is not timed: LlamaForCausalLM takes no cache of fixed size"
    ]


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
def test_a_decoding_step_goes_on_where_the_prompt_ends_however_often_it_is_called(name, monkeypatch):
    from sparsify import measure
    from sparsify.bench import workloads as bench_workloads

    monkeypatch.setattr(bench_workloads, "_steps", lambda device: 3)
    model = BY_NAME[name].build().eval()
    task = Workload("decode", 2, 6).on(model)
    ids = measure.token_inputs(model, 6, 2)["input_ids"]
    with torch.no_grad():
        whole = model(input_ids=torch.cat([ids, ids[:, :1]], 1)).logits[:, -1:]
    assert (task.passes, task.units) == (3, 6)
    for _ in range(3):
        torch.testing.assert_close(task.output(), whole, atol=1e-4, rtol=1e-4)
        task.call()
    heads = getattr(model.config, "num_key_value_heads", model.config.num_attention_heads)
    width = model.config.hidden_size // model.config.num_attention_heads
    cached = 2 * model.config.num_hidden_layers * 2 * heads * width * 9 * 4
    assert cached <= task.state_bytes <= cached + 64 * model.config.num_hidden_layers


def test_a_prefill_ends_with_one_token_and_is_checked_at_many(monkeypatch):
    from sparsify.bench import workloads as bench_workloads

    model = BY_NAME["llama"].build().eval()
    task = Workload("prefill", 2, 9).on(model)
    assert task.call().shape == (2, 1, model.config.vocab_size)  # pyright: ignore
    assert task.output().shape == (2, 9, model.config.vocab_size)
    monkeypatch.setattr(bench_workloads, "MOST_LOGITS", 2 * 4 * model.config.vocab_size)
    few = Workload("prefill", 2, 9).on(model).output()
    torch.testing.assert_close(few, task.output()[:, [0, 3, 5, 8]])


def test_the_limit_is_the_longer_of_arithmetic_and_bytes():
    assert Limits(flops=100.0, bytes=10.0).seconds(50, 20) == 2.0
    assert Limits(flops=100.0, bytes=10.0).seconds(500, 20) == 5.0


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral", "qwen3-moe"])
def test_arithmetic_of_stored_blocks_alone_is_counted(name):
    dense = BY_NAME[name].build().eval()
    model = sparse_model(name, 0.75).eval()
    ids = torch.randint(dense.config.vocab_size, (2, 8))
    counts = [flops_of(lambda m=m: m(input_ids=ids)) for m in (dense, model)]
    removed = 0.0
    for module in sparse_modules(model).values():
        for packed in module.packed.values():
            share = 1.0
            if packed.count > 1:
                share = dense.config.num_experts_per_tok / packed.count
            stored = module.get_parameter(packed.name).numel()
            removed += 2 * 16 * share * (packed.count * packed.shape[0] * packed.shape[1] - stored)
    # Edge blocks are multiplied whole, and experts get different numbers of tokens.
    assert counts[0] - counts[1] == pytest.approx(removed, rel=0.15)
    assert counts[0] > 2 * 16 * sum(
        p.numel() for n, p in dense.named_parameters() if p.dim() == 2 and "embed" not in n and "wte" not in n
        and "wpe" not in n
    )  # fmt: skip


def test_a_stored_block_of_a_convolution_meets_every_output_pixel():
    keep = torch.tensor([[True, False], [True, True], [False, False], [False, True]])
    conv = BlockSparseConv2d(32, 64, 3, 16, keep, stride=2, padding=1, bias=False).eval()
    x = torch.randn(2, 32, 9, 7)
    dense = flops_of(lambda: conv.to_conv()(x))
    assert dense == 2 * 2 * 5 * 4 * 64 * 32 * 9
    assert flops_of(lambda: conv(x)) == dense // 2


def test_embeddings_are_read_by_row_and_experts_as_far_as_they_are_chosen():
    linear, table = nn.Linear(10, 20, bias=False), nn.Embedding(1000, 10)
    assert weight_bytes(nn.Sequential(table, linear), 3) == 4 * (3 * 10 + 200)
    tied = nn.Linear(10, 1000, bias=False)
    tied.weight = table.weight
    assert weight_bytes(nn.Sequential(table, tied), 3) == 4 * 10_000
    model = BY_NAME["mixtral"].build()
    experts = model.model.layers[0].mlp.experts
    size, count = experts.gate_up_proj.nbytes + experts.down_proj.nbytes, len(experts.down_proj)
    assert weight_bytes(experts, 1, 2) == pytest.approx(size * 2 / count)
    assert weight_bytes(experts, 100, 2) == size
    experts.config = SimpleNamespace()
    assert weight_bytes(experts, 1) == size  # nobody says how many are chosen


def test_energy_stands_beside_the_time(monkeypatch):
    from sparsify.bench.energy import Energy

    model = sparse_model("llama")
    twin = bench_model.dense_twin(model)
    left = [8.0, 2.0]

    def gauge(call, wait):
        call()
        wait()
        assert not torch.is_grad_enabled()
        return Energy(left.pop(0), 9.0, 300.0, 80.0, 4.0, 100, 60)

    works = [Workload("prefill", 2, 4)]
    rows = bench_model.measure_models(model, twin, works, [0.0], LIMITS, 2, lambda: None, gauge)
    assert rows[0]["energy"]["dense"]["joules_per_unit"] == 1.0
    assert rows[0]["energy"]["sparse"]["joules_per_unit"] == 0.25
    header, cells = verdict.energy_table(rows)
    assert dict(zip(header, cells[0], strict=True)) == {
        "energy above idle": "prefill of 2 x 4 tokens", "unit": "token", "dense mJ": "1000", "sparse mJ": "250",
        "saved": "75%", "dense W": "300", "sparse W": "300", "seconds": "4.0", "updates": "60",
    }  # fmt: skip
    rows = bench_model.measure_models(model, twin, works, [0.0], LIMITS, 2, lambda: None, lambda *_: None)
    assert rows[0]["energy"] is None and verdict.energy_table(rows)[1] == []
    assert rows[0]["sparse_rate"] == pytest.approx(8 / (rows[0]["sparse_us"] / 1e6))
    assert rows[0]["sparse_peak_bytes"] < rows[0]["dense_peak_bytes"]


def test_a_counter_that_fails_leaves_a_note_and_no_number(tmp_path, monkeypatch):
    from sparsify.bench import energy

    sparsify.save(sparse_model("llama"), tmp_path / "sparse")
    options = {"tokens": [2], "repeats": 1, "device": "cpu", "energy": True}

    def nothing(device):
        raise energy.NoCounter("there is none")

    monkeypatch.setattr(energy, "open_meter", nothing)
    report = bench(tmp_path / "sparse", **options)
    assert report["energy"] is None and report["notes"][-1] == "energy is not measured: there is none"
    assert all(row["energy"] is None for row in report["end_to_end"]["times"])

    def stops(*arguments):
        raise energy.NoCounter("it stopped")

    monkeypatch.setattr(energy, "open_meter", lambda device: SimpleNamespace(name="fake"))
    monkeypatch.setattr(energy, "idle_power", lambda meter: energy.Idle(80.0, 0.1))
    monkeypatch.setattr(energy, "energy_of", stops)
    report = bench(tmp_path / "sparse", **options)
    assert report["energy"] == {"meter": "fake", "idle_watts": 80.0}
    assert [note for note in report["notes"] if "energy" in note] == [
        "energy is not measured everywhere: it stopped"
    ]
    assert all(row["energy"] is None for row in report["end_to_end"]["times"])


def row(tokens: int, speedup: float, how: str = "cpu"):
    times = {"speedup": speedup, "timing": how, "dense_us": speedup * 10, "sparse_us": 10.0}
    shares = {"dense_share": 0.8, "sparse_share": 0.4}
    size = {"what": "prefill", "batch": 1, "tokens": tokens, "unit": "token", "samples": None}
    return size | times | shares


def test_the_closing_sentence_counts_layers_not_groups():
    groups = [
        {"names": ["a"] * 12, "times": [row(1, 0.5), row(256, 3.0)]},
        {"names": ["b", "c"], "times": [row(1, 0.9), row(256, 1.01)]},
    ]
    assert verdict.closing(groups, {"times": [row(1, 0.7), row(256, 2.0)]}) == (
        "At 1 token 14 of 14 layers are slower sparse than dense; "
        "at 256 tokens 12 of 14 layers are faster sparse than dense, 2 are as fast as dense; "
        "the whole model has 0.70x in prefill of 1 token and 2.00x in prefill of 256 tokens the speed of the dense one."
    )
    assert "14 layers lose" in (verdict.advice(groups) or "")
    both = {"times": [row(1, 1.5, "graph"), row(1, 0.9, "eager")]}
    said = "1.50x in prefill of 1 token (CUDA graph) and 0.90x in prefill of 1 token (eager)"
    assert said in verdict.closing([], both)
    assert verdict.advice([{"names": ["a"], "times": [row(1, 1.5)]}]) is None
    # With pictures each layer has a number of pixels of its own.
    pictures = [[row(100, 2.0) | {"samples": 2}], [row(25, 0.5) | {"samples": 2}]]
    said = verdict.closing([{"names": ["a"], "times": times} for times in pictures], None)
    assert said == "At 2 samples 1 of 2 layers is faster sparse than dense, 1 is slower sparse than dense."


def test_losing_rows_are_marked():
    common = {"name": "a", "names": ["a"], "shapes": [[8, 16]], "block": "8x8", "density": 0.5, "bytes": 1}
    group = common | {"bytes_dense": 2, "times": [row(1, 0.5), row(16, 2.0)], "skipped": None}
    header, rows = verdict.layer_table([group])
    assert [cells[-4:] for cells in rows] == [
        ["0.50x", "80%", "40%", "slower than dense"],
        ["2.00x", "80%", "40%", ""],
    ]
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
    assert [row["timing"] for row in report["end_to_end"]["times"]] == ways * 4  # prefill and decoding
