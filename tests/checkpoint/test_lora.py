"""PEFT LoRA on block-sparse layers: the update exists at stored blocks alone, so that a merge changes nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf

from sparsify.checkpoint import writer
from sparsify.errors import ConfigError
from sparsify.layers.linear import BlockSparseLinear
from sparsify.layers.swap import convert, masks_of
from tests.architectures.zoo import BY_NAME, prune

peft = pytest.importorskip("peft")
TARGETS = {"llama": ["q_proj", "v_proj", "down_proj"], "gpt2": ["c_attn", "c_fc"]}


@pytest.fixture(autouse=True)
def unfused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Results are compared bit by bit here, and a fused activation is rounded elsewhere than torch's own."""
    monkeypatch.setenv("SPARSIFY_FUSE", "0")


@pytest.fixture(params=["llama", "gpt2"])
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def folder(name: str, tmp_path: Path) -> Path:
    model = BY_NAME[name].build()
    masks, _ = prune(model, BY_NAME[name].block)
    convert(model, masks)
    return writer.save(model, tmp_path / "sparse")


def train(model: Any, name: str, steps: int = 3) -> None:
    batch = BY_NAME[name].batch()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model.train()
    for _ in range(steps):
        model(**batch, labels=batch["input_ids"]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


def logits(model: Any, name: str) -> torch.Tensor:
    with torch.no_grad():
        return model(**BY_NAME[name].batch()).logits


def test_train_save_reload_merge(name: str, folder: Path, tmp_path: Path) -> None:
    base = BY_NAME[name].load(folder)
    before = logits(base, name)
    masks = masks_of(base)
    model = peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules=TARGETS[name], lora_dropout=0.1))
    trainable = {key for key, p in model.named_parameters() if p.requires_grad}
    assert trainable and all("lora_" in key for key in trainable)
    torch.testing.assert_close(logits(model, name), before)  # B starts at zero
    train(model, name)
    after = logits(model, name)
    assert (after - before).abs().max() > 1e-2

    model.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(BY_NAME[name].load(folder), tmp_path / "adapter")
    torch.testing.assert_close(logits(again, name), after)
    with again.disable_adapter():
        torch.testing.assert_close(logits(again, name), before)

    merged = again.merge_and_unload()
    assert torch.equal(logits(merged, name), after)
    assert {key: mask.keep.tolist() for key, mask in masks_of(merged).items()} == {
        key: mask.keep.tolist() for key, mask in masks.items()
    }
    merged.save_pretrained(tmp_path / "merged")
    assert torch.equal(logits(BY_NAME[name].load(tmp_path / "merged"), name), after)
    size = [(path / "model.safetensors").stat().st_size for path in (tmp_path / "merged", folder)]
    assert size[0] == size[1]


def test_update_equals_the_masked_dense_one() -> None:
    torch.manual_seed(0)
    keep = torch.rand(3, 4) > 0.5
    layer = BlockSparseLinear(100, 72, (32, 32), keep, bias=True)
    model = torch.nn.ModuleDict({"fc": layer})
    tuned = peft.inject_adapter_in_model(peft.LoraConfig(r=3, target_modules=["fc"]), model)["fc"]
    torch.nn.init.normal_(tuned.lora_B["default"].weight)
    x = torch.randn(5, 100, dtype=torch.float32, requires_grad=True)
    down, up = tuned.lora_A["default"].weight, tuned.lora_B["default"].weight
    weight = layer.dense_weight() + tuned.scaling["default"] * (up @ down) * layer.mask.elements()
    want = torch.nn.functional.linear(x, weight, layer.bias)
    torch.testing.assert_close(tuned(x), want)
    got = torch.autograd.grad(tuned(x).square().sum(), [x, up, down])
    torch.testing.assert_close(got, torch.autograd.grad(want.square().sum(), [x, up, down]))


def test_dropout_path_agrees_in_the_mean() -> None:
    layer = BlockSparseLinear(64, 64, (32, 32), torch.eye(2) > 0)
    config = peft.LoraConfig(r=3, target_modules=["fc"], lora_dropout=0.5)
    tuned = peft.inject_adapter_in_model(config, torch.nn.ModuleDict({"fc": layer}))["fc"]
    torch.nn.init.normal_(tuned.lora_B["default"].weight, std=0.1)
    x = torch.randn(1, 64).expand(20_000, 64)
    with torch.no_grad():
        mean = tuned.train()(x).mean(0)
        torch.testing.assert_close(mean, tuned.eval()(x[0]), rtol=0.05, atol=0.05)


def test_merge_and_unmerge(name: str, folder: Path) -> None:
    model = peft.get_peft_model(
        BY_NAME[name].load(folder), peft.LoraConfig(r=4, target_modules=TARGETS[name])
    )
    train(model, name)
    want = logits(model, name)
    model.merge_adapter(safe_merge=True)
    assert torch.equal(logits(model, name), want)
    model.unmerge_adapter()
    torch.testing.assert_close(logits(model, name), want)


def test_all_linear_means_sparse_layers_too(folder: Path, name: str) -> None:
    base = BY_NAME[name].load(folder)
    count = sum(isinstance(module, BlockSparseLinear) for module in base.modules())
    model = peft.get_peft_model(base, peft.LoraConfig(target_modules="all-linear"))
    assert sum(type(module).__name__ == "BlockSparseLora" for module in model.modules()) == count


def test_adapter_of_transformers_itself(folder: Path, name: str, tmp_path: Path) -> None:
    """`model.add_adapter` and `load_adapter`, without a `PeftModel` around."""
    model = BY_NAME[name].load(folder)
    model.add_adapter(peft.LoraConfig(r=4, target_modules=TARGETS[name]))
    train(model, name)
    want = logits(model, name)
    model.save_pretrained(tmp_path / "adapter")
    again = BY_NAME[name].load(folder)
    again.load_adapter(str(tmp_path / "adapter"))
    torch.testing.assert_close(logits(again, name), want)


def test_bfloat16_base(folder: Path, name: str) -> None:
    """PEFT keeps adapters in float32; the layer computes in the base's dtype."""
    base = BY_NAME[name].load(folder, dtype=torch.bfloat16)
    model = peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules=TARGETS[name]))
    train(model, name)
    want = logits(model, name)
    assert want.dtype == torch.bfloat16
    assert torch.equal(logits(model.merge_and_unload(), name), want)


@pytest.mark.parametrize(
    "option", [{"use_dora": True}, {"lora_bias": True}, {"init_lora_weights": "pissa"}], ids=str
)
def test_variants_are_refused(option: dict[str, Any]) -> None:
    model = torch.nn.ModuleDict({"fc": BlockSparseLinear(64, 64, (32, 32))})
    with pytest.raises(ConfigError, match="plain LoRA only"):
        peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["fc"], **option), model)


def test_experts_are_refused_and_attention_beside_them_works(tmp_path: Path) -> None:
    case = BY_NAME["mixtral"]
    model = case.build()
    masks, _ = prune(model, case.block)
    convert(model, masks)
    writer.save(model, tmp_path / "sparse")
    config = peft.LoraConfig(target_parameters=["mlp.experts.gate_up_proj"])
    with pytest.raises(ConfigError, match="not available for BlockSparseExperts"):
        peft.get_peft_model(case.load(tmp_path / "sparse"), config)
    tuned = peft.get_peft_model(
        case.load(tmp_path / "sparse"), peft.LoraConfig(target_modules=["q_proj", "v_proj"])
    )
    train(tuned, "mixtral", steps=1)
    assert any(isinstance(m, hf.PreTrainedModel) for m in tuned.modules())
