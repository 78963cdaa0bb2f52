"""Cost is counted from what is really stored, allocated and timed."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration

from sparsify import measure
from sparsify.errors import ConfigError


def make_llama(tied: bool = True) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
    )
    return LlamaForCausalLM(config)


class Wide(nn.Module):
    """`(tokens, 64)` through two layers; the widest moment holds input and output of the activation."""

    def __init__(self, width: int):
        super().__init__()
        self.up, self.down = nn.Linear(64, width), nn.Linear(width, 64)

    def forward(self, x):
        return self.down(torch.relu(self.up(x)))


class Waits(nn.Module):
    """A forward pass of a known time, on a clock that the test owns."""

    def __init__(self, clock: list[float], seconds: list[float]):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.clock, self.seconds, self.modes = clock, seconds, []

    def forward(self, x):
        self.modes.append((self.training, torch.is_grad_enabled()))
        self.clock[0] += self.seconds[(len(self.modes) - 1) % len(self.seconds)]


def test_tied_parameters_count_once():
    tied, untied = make_llama(True), make_llama(False)
    assert measure.parameter_count(untied) - measure.parameter_count(tied) == 128 * 64
    assert measure.model_bytes(untied) - measure.model_bytes(tied) == 128 * 64 * 4


def test_model_bytes_holds_buffers_and_each_storage_once():
    model = nn.Module()
    model.a = nn.Parameter(torch.zeros(10, dtype=torch.bfloat16))
    model.register_buffer("view", model.a.detach()[:5])
    model.register_buffer("indices", torch.zeros(6, dtype=torch.int32), persistent=False)
    assert measure.model_bytes(model) == 10 * 2 + 6 * 4


def test_model_bytes_counts_what_has_the_address_of_an_empty_tensor(tmp_path):
    from safetensors.torch import load_file, save_file

    names = ["a", "b", "c"]
    save_file({name: torch.ones(4 * (name != "b")) for name in names}, tmp_path / "weights.safetensors")
    model = nn.ParameterDict(load_file(tmp_path / "weights.safetensors"))
    assert measure.model_bytes(model) == 2 * 4 * 4


def test_bytes_on_disk_are_those_of_the_weight_files(tmp_path):
    make_llama().save_pretrained(tmp_path, max_shard_size="40KB")
    shards = list(tmp_path.glob("*.safetensors"))
    assert len(shards) > 1
    assert measure.bytes_on_disk(tmp_path) == sum(shard.stat().st_size for shard in shards)


@pytest.mark.parametrize("tokens", [1, 100])
def test_peak_memory_is_weights_and_the_widest_moment(tokens):
    model = Wide(width=256)
    expected = measure.model_bytes(model) + 2 * tokens * 256 * 4
    assert measure.peak_memory_forward(model, {"x": torch.randn(tokens, 64)}) == expected
    assert model.training


def test_peak_memory_sees_memory_inside_a_custom_operator():
    with torch.library._scoped_library("sparsify_test_measure", "FRAGMENT") as library:
        library.define("hungry(Tensor x) -> Tensor")
        library.impl("hungry", lambda x: (x.new_zeros(1000, 1000) + 1).sum(0)[:64] + x, "CPU")
        model = Wide(width=64)
        model.forward = lambda x: torch.ops.sparsify_test_measure.hungry(x)
        peak = measure.peak_memory_forward(model, {"x": torch.randn(64)})
    assert peak - measure.model_bytes(model) >= 2 * 1000 * 1000 * 4


def test_peak_memory_writes_nothing():
    script = (
        "import torch; from sparsify import measure; m = torch.nn.Linear(8, 8); "
        "measure.peak_memory_forward(m, {'input': torch.zeros(1, 8)})"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("", "")


def test_latency_is_the_median_of_turns_after_warm_up(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(measure.time, "perf_counter", lambda: clock[0])
    # The first pass of each is warm-up; of the three that count, one was disturbed.
    slow, fast = Waits(clock, [9.0, 2.0, 7.0, 2.0]), Waits(clock, [9.0, 1.0, 1.0, 1.0])
    inputs = {"x": torch.zeros(1)}
    assert measure.compare_latency({"slow": slow, "fast": fast}, inputs, repeats=3, warmup=1) == {
        "slow": 2.0,
        "fast": 1.0,
    }
    assert slow.modes == [(False, False)] * 4
    assert slow.training
    assert measure.latency(Waits(clock, [0.5]), inputs, repeats=2, warmup=0) == 0.5


def test_latency_needs_a_pass_to_time():
    with pytest.raises(ConfigError, match="a pass to time"):
        measure.latency(nn.Linear(1, 1), {}, repeats=0)


def test_token_inputs_fit_the_model():
    inputs = measure.token_inputs(make_llama(), 7, batch=2)
    assert inputs["input_ids"].shape == (2, 7)
    assert int(inputs["input_ids"].max()) < 128
    assert make_llama()(**inputs).logits.shape == (2, 7, 128)
    config = T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4)
    encoder_decoder = T5ForConditionalGeneration(config)
    assert encoder_decoder(**measure.token_inputs(encoder_decoder, 5)).logits.shape == (1, 5, 64)
    with pytest.raises(ConfigError, match="Linear has no vocabulary"):
        measure.token_inputs(nn.Linear(1, 1), 5)


def test_environment_places_a_measurement():
    found = measure.environment()
    assert found["threads"] == torch.get_num_threads()
    assert torch.__version__.startswith(found["versions"]["torch"].split("+")[0])
    assert found["versions"]["sparsify"]
    assert found["cpu"] and found["command"]
