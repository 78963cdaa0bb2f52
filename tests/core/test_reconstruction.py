"""Local reconstruction: nearer to the dense model, masks untouched, nothing lost by an interruption."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from torch import nn

import sparsify
from sparsify.errors import ConfigError, PrunerError
from sparsify.runtime.progress import Progress

SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}


def llama() -> nn.Module:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(num_key_value_heads=2, **SMALL)).eval()


def bert() -> nn.Module:
    return transformers.BertModel(transformers.BertConfig(**SMALL)).eval()


def mixtral() -> nn.Module:
    config = transformers.MixtralConfig(num_key_value_heads=2, num_local_experts=4, **SMALL)
    return transformers.MixtralForCausalLM(config).eval()


def batches(count: int = 16) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    found = []
    for _ in range(count):
        ids = torch.randint(0, 64, (4, 12), generator=generator)
        mask = torch.ones_like(ids)
        mask[1, 7:] = 0
        found.append({"input_ids": ids, "attention_mask": mask})
    return found


def error(dense: nn.Module, pruned: nn.Module, data: list[dict[str, torch.Tensor]]) -> float:
    """Relative squared error of the outputs, without padding."""
    with torch.no_grad():
        total = size = 0.0
        for batch in data:
            valid = batch["attention_mask"].bool()
            a, b = (m(**batch)[0][valid].float() for m in (dense, pruned))
            total, size = total + float((a - b).square().sum()), size + float(a.square().sum())
    return total / size


@pytest.mark.parametrize(
    ("make", "method"), [(llama, "magnitude"), (bert, "block_obs"), (mixtral, "block_obs")]
)
def test_the_model_comes_nearer_to_the_dense_one_on_data_it_has_not_seen(make, method):
    dense, data = make(), batches(20)
    plain, better = copy.deepcopy(dense), copy.deepcopy(dense)
    given = {"method": method, "block": 8, "sparsity": 0.5, "calibration": data[:16], "convert": False}
    sparsify.prune(plain, **given)
    result = sparsify.prune(better, **given, reconstruct=60)
    assert error(dense, better, data[16:]) < 0.9 * error(dense, plain, data[16:])
    for name, mask in result.masks.items():
        module, _, rest = name.partition(".experts.")
        if not rest:
            weight = better.get_submodule(name).weight
            assert torch.equal(weight != 0, mask.elements()), "kept weights are kept, removed ones zero"
        else:
            parameter, expert = rest.split(".")
            weight = getattr(better.get_submodule(f"{module}.experts"), parameter)[int(expert)]
            assert not weight[~mask.elements()].any()


def test_half_precision_models_stay_what_they_are_and_gain_all_the_same():
    dense, data = llama().bfloat16(), batches(16)
    plain, better = copy.deepcopy(dense), copy.deepcopy(dense)
    given = {"method": "magnitude", "block": 8, "sparsity": 0.5, "calibration": data, "convert": False}
    sparsify.prune(plain, **given)
    sparsify.prune(better, **given, reconstruct=60)
    assert {p.dtype for p in better.parameters()} == {torch.bfloat16}
    assert error(dense, better, data) < 0.9 * error(dense, plain, data)
    assert not any(p.requires_grad and p.grad is not None for p in better.parameters())


def test_what_does_not_help_is_not_kept(monkeypatch):
    monkeypatch.setattr("sparsify.calibration.reconstruction.RATE", 1e4)  # diverges at once
    data = batches(8)
    plain = llama()
    reckless = copy.deepcopy(plain)
    given = {"method": "magnitude", "block": 8, "sparsity": 0.5, "calibration": data, "convert": False}
    sparsify.prune(plain, **given)
    sparsify.prune(reckless, **given, reconstruct=5)
    for a, b in zip(plain.parameters(), reckless.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_an_interrupted_walk_goes_on_to_the_same_weights(tmp_path, monkeypatch):
    import sparsify.calibration.sequential as sequential

    dense, data = llama(), batches(8)
    given = {"method": "block_obs", "block": 8, "sparsity": 0.5, "calibration": data, "convert": False}
    whole, broken = copy.deepcopy(dense), copy.deepcopy(dense)
    sparsify.prune(whole, **given, reconstruct=10)
    original, calls = sequential.reconstruct_block, []

    def once(*args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    monkeypatch.setattr(sequential, "reconstruct_block", once)
    with pytest.raises(KeyboardInterrupt):
        sparsify.prune(broken, **given, reconstruct=10, cache=tmp_path)
    again = copy.deepcopy(dense)
    sparsify.prune(again, **given, reconstruct=10, cache=tmp_path)
    assert len(calls) == 3, "the first block was not done again"
    for a, b in zip(whole.parameters(), again.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_the_error_of_each_block_is_told():
    from sparsify.allocation.budget import Budget
    from sparsify.blocks import BlockShape
    from sparsify.calibration.sequential import prune_in_walks
    from sparsify.pruner import create_pruner
    from sparsify.targets import select

    class Notes(Progress):
        def __init__(self) -> None:
            self.lines: list[str] = []

        def note(self, text: str) -> None:
            self.lines.append(text)

    model, notes = bert(), Notes()
    layers = select(model, BlockShape(8, 8)).layers
    prune_in_walks(
        model, create_pruner("magnitude"), layers, Budget(0.5), batches(8), reconstruct=20, progress=notes
    )
    assert [line.partition(":")[0] for line in notes.lines] == ["encoder.layer.0", "encoder.layer.1"]
    before, after = notes.lines[0].rpartition("error ")[2].split(" -> ")
    assert float(after[:-1]) < float(before[:-1])


def test_data_are_needed_and_outputs_must_be_finite():
    with pytest.raises(ConfigError, match="reconstruct needs calibration data"):
        sparsify.prune(llama(), method="magnitude", block=8, reconstruct=10)
    with pytest.raises(ConfigError, match="reconstruct"):
        sparsify.prune(llama(), method="magnitude", block=8, reconstruct=-1, calibration=batches(1))
    broken = llama()
    broken.model.layers[1].post_attention_layernorm.weight.data[3] = float("inf")
    with pytest.raises(PrunerError, match=r"model\.layers\.1"):
        sparsify.prune(broken, method="magnitude", block=8, reconstruct=2, calibration=batches(2))


def test_the_default_follows_the_data():
    from sparsify.pruner import default_method

    assert default_method(False, None, None) == ("magnitude", 0)
    assert default_method(True, None, None) == ("block_obs", 300)
    assert default_method(True, None, 0) == ("block_obs", 0)
    assert default_method(True, "wanda", None) == ("wanda", 0)


def test_the_command_line_reconstructs_and_offloads(tmp_path):
    from typer.testing import CliRunner

    from sparsify.cli.main import app

    source, text = tmp_path / "model", tmp_path / "texts.txt"
    llama().save_pretrained(source)
    tokenizer(source)
    text.write_text("the blocks that stay make up for those that go\n" * 40)
    command = ["prune", str(source), "--block", "8", "--data", str(text), "--length", "16", "--samples", "32"]
    shown = CliRunner().invoke(
        app, [*command, "--out", str(tmp_path / "out"), "--reconstruct", "5", "--offload"]
    )
    assert shown.exit_code == 0, shown.output
    assert (
        "output error" in shown.output
        and "block_obs" in (tmp_path / "out" / "sparsify_recipe.yaml").read_text()
    )
    assert sparsify.load(tmp_path / "out").config.quantization_config is not None
    refused = CliRunner().invoke(
        app, ["prune", str(source), "--out", str(tmp_path / "no"), "--block", "8", "--reconstruct", "5"]
    )
    assert (
        refused.exit_code == 2 and "reconstruct needs a calibrate stage before it (--data)" in refused.output
    )
    assert not (tmp_path / "no").exists()


def tokenizer(folder) -> None:
    """A tokenizer of single bytes."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = {token: i for i, token in enumerate([*"abcdefghijklmnopqrstuvwxyz", "<unk>"])}
    fresh = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>"))
    fresh.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=fresh, unk_token="<unk>").save_pretrained(folder)


def test_every_step_is_told_and_the_bar_ends_full(tmp_path):
    from contextlib import contextmanager

    from sparsify.allocation.budget import Budget
    from sparsify.blocks import BlockShape
    from sparsify.calibration.cache import WalkCache
    from sparsify.calibration.sequential import prune_in_walks
    from sparsify.pruner import create_pruner
    from sparsify.targets import select

    class Bars(Progress):
        def __init__(self) -> None:
            self.done: dict[str, list[float]] = {}

        @contextmanager
        def task(self, label, total=None):
            count = self.done[label] = [0, total]

            def advance(more=1, *, total=None, text=""):
                count[0] += more

            yield advance

    for model in (bert(), llama()):
        for steps in (0, 7):
            bars, fresh = Bars(), copy.deepcopy(model)
            layers = select(fresh, BlockShape(8, 8)).layers
            given = (fresh, create_pruner("block_obs"), layers, Budget(0.5), batches(8))
            prune_in_walks(*given, reconstruct=steps, progress=bars, cache=WalkCache(tmp_path))
            assert bars.done["adjusting weights"] == [2 * (1 + steps)] * 2
