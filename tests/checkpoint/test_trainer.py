"""HF Trainer on block-sparse models: train, checkpoint, resume, push, all with its own code and ours out of sight."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file

from sparsify.checkpoint import reader, writer
from sparsify.checkpoint.conversions import own_names
from sparsify.checkpoint.quantizer import attach
from sparsify.layers.swap import convert, masks_of, sparse_modules
from tests.architectures.zoo import BY_NAME, prune


class Samples(torch.utils.data.Dataset):
    """Eight fixed sequences of a language model."""

    def __init__(self) -> None:
        self.ids = torch.randint(3, 320, (8, 16), generator=torch.Generator().manual_seed(4))

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.ids[index], "labels": self.ids[index]}


def trainer(model: Any, out: Path, steps: int, **options: Any) -> hf.Trainer:
    arguments = hf.TrainingArguments(
        output_dir=str(out),
        max_steps=steps,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        save_steps=2,
        report_to=[],
        disable_tqdm=True,
        seed=5,
        use_cpu=True,
        **options,
    )
    return hf.Trainer(model=model, args=arguments, train_dataset=Samples())


@pytest.fixture(params=["llama", "gpt2", "mixtral"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    case = BY_NAME[request.param]
    model = case.build()
    masks, _ = prune(model, case.block)
    convert(model, masks)
    return writer.save(model, tmp_path / request.param)


def test_train_checkpoint_resume(folder: Path, tmp_path: Path) -> None:
    """Four steps in one run end where two steps, a checkpoint, and two resumed steps end."""
    load = hf.AutoModelForCausalLM.from_pretrained
    model = load(folder)
    masks = {name: mask.keep.tolist() for name, mask in masks_of(model).items()}
    before = {name: module.state_dict() for name, module in sparse_modules(load(folder)).items()}
    whole = trainer(model, tmp_path / "run", 4)
    whole.train()
    for name, module in sparse_modules(model).items():
        for packed in module.packed:
            assert not torch.equal(module.state_dict()[packed], before[name][packed]), name

    step2 = tmp_path / "run" / "checkpoint-2"
    resumed = trainer(load(folder), tmp_path / "resumed", 4)
    resumed.train(resume_from_checkpoint=str(step2))
    assert resumed.state.global_step == 4
    want, got = model.state_dict(), resumed.model.state_dict()
    assert want.keys() == got.keys()
    for key in want:
        torch.testing.assert_close(got[key], want[key], msg=key)

    final = load(tmp_path / "run" / "checkpoint-4")
    assert {name: mask.keep.tolist() for name, mask in masks_of(final).items()} == masks
    assert len(reader.open_checkpoint(tmp_path / "run" / "checkpoint-4").layers) >= len(sparse_modules(final))
    assert (
        sum(file.stat().st_size for file in (tmp_path / "run" / "checkpoint-4").glob("*.safetensors"))
        == (folder / "model.safetensors").stat().st_size
    )


def test_dense_experts_resume_under_their_own_names(tmp_path: Path) -> None:
    """The search on dense weights: without `own_names`, Trainer would go on with other experts, and only warn."""
    case = BY_NAME["mixtral"]
    model, again = case.build(), case.build()
    with own_names(model):
        trainer(model, tmp_path / "run", 4).train()
    trainer(again, tmp_path / "again", 4).train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    for key, tensor in model.state_dict().items():
        torch.testing.assert_close(again.state_dict()[key], tensor, msg=key)
    loaded = case.load(tmp_path / "run" / "checkpoint-4")
    for key, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], tensor), key
    model.save_pretrained(tmp_path / "after")
    names = load_file(tmp_path / "after" / "model.safetensors").keys()
    assert any(".block_sparse_moe.experts.0.w1." in name for name in names)


def test_optimizer_state_exists_for_stored_blocks_alone(folder: Path, tmp_path: Path) -> None:
    model = hf.AutoModelForCausalLM.from_pretrained(folder)
    run = trainer(model, tmp_path / "run", 1, bf16=True, gradient_checkpointing=True)
    run.train()
    states = run.optimizer.state
    for module in sparse_modules(model).values():
        for name in module.packed:
            parameter = module.get_parameter(name)
            assert states[parameter]["exp_avg"].shape == parameter.shape
            assert torch.isfinite(parameter).all()


def test_padding_stays_zero_in_training(tmp_path: Path) -> None:
    case = BY_NAME["llama"]
    model = case.build()
    masks, _ = prune(model, case.block)
    convert(model, masks)
    attach(model)
    trainer(model, tmp_path / "run", 2).train()
    for module in sparse_modules(model).values():
        again = type(module).from_dense(module.dense_weight(), None, module.mask)
        assert torch.equal(again.weight, module.weight)


def test_model_swapped_in_memory_trains_and_saves(tmp_path: Path) -> None:
    """The way of the recovery stage: no checkpoint between pruning and training."""
    case = BY_NAME["mixtral"]
    model = case.build()
    masks, _ = prune(model, case.block)
    convert(model, masks)
    attach(model, {"made_by": "a test"})
    run = trainer(model, tmp_path / "run", 2)
    run.train()
    loaded = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "checkpoint-2")
    with torch.no_grad():
        batch = case.batch()
        torch.testing.assert_close(loaded(**batch).logits, model.eval()(**batch).logits)
    config = json.loads((tmp_path / "run" / "checkpoint-2" / "config.json").read_text())
    assert config["quantization_config"]["made_by"] == "a test"


def test_push_to_hub_uploads_a_whole_checkpoint(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers' own path; only the network call is replaced, by one that keeps what would be sent."""
    sent: dict[str, bytes] = {}

    def create_commit(self: Any, *args: Any, operations: Any = (), **kwargs: Any) -> Any:
        for operation in operations:
            with operation.as_file() as stream:
                sent[operation.path_in_repo] = stream.read()
        return None

    class Repository:
        repo_id = "someone/sparse"

    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", lambda self, *a, **k: Repository())
    monkeypatch.setattr(huggingface_hub.HfApi, "create_commit", create_commit)
    monkeypatch.setattr(huggingface_hub, "create_commit", lambda *a, **k: create_commit(None, *a, **k))
    monkeypatch.setattr("transformers.utils.hub.create_commit", huggingface_hub.create_commit, raising=False)
    monkeypatch.setattr(
        "transformers.modeling_utils.create_and_tag_model_card",
        lambda *args, **kwargs: huggingface_hub.ModelCard("---\nlicense: mit\n---\n"),
    )
    monkeypatch.setattr(huggingface_hub.ModelCard, "validate", lambda self, repo_type=None: None)
    model = hf.AutoModelForCausalLM.from_pretrained(folder)
    model.push_to_hub("someone/sparse")
    assert {"config.json", "model.safetensors"} <= sent.keys()
    received = tmp_path / "received"
    received.mkdir()
    for name, content in sent.items():
        (received / name).write_bytes(content)
    again = hf.AutoModelForCausalLM.from_pretrained(received)
    assert {k: v.tolist() for k, v in again.state_dict().items() if k.endswith("_indices")} == {
        k: v.tolist() for k, v in model.state_dict().items() if k.endswith("_indices")
    }
    assert (received / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
