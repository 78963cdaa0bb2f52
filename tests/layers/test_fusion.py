"""Fused MLPs in real models: the same function in fewer kernels, and out of the way of everything else."""

from __future__ import annotations

import pickle
from collections import Counter
from copy import deepcopy
from typing import Any

import pytest
import torch
import transformers as hf
from accelerate.hooks import ModelHook, add_hook_to_module
from torch import nn

from sparsify.bench.model import dense_twin
from sparsify.checkpoint import writer
from sparsify.checkpoint.quantizer import attach
from sparsify.kernels.linear import library
from sparsify.layers.fusion import FusedMlp, fuse, unfuse
from sparsify.layers.linear import BlockSparseLinear
from sparsify.layers.swap import convert
from tests.architectures.zoo import BY_NAME, DECODER, ENCODER, TEXT, VISION, VOCABULARY, Architecture, prune


def _t5(kind: str) -> Any:
    return hf.T5Config(
        vocab_size=VOCABULARY, d_model=128, d_kv=32, num_heads=4, d_ff=344, num_layers=2, num_decoder_layers=2,
        feed_forward_proj=kind, decoder_start_token_id=0, pad_token_id=0, eos_token_id=None,
    )  # fmt: skip


def _gelu_clip() -> Any:
    text = {**ENCODER, "projection_dim": 96, "eos_token_id": 2, "hidden_act": "gelu"}
    vision = {**VISION, "projection_dim": 96, "hidden_act": "gelu"}
    return hf.CLIPConfig(text_config=text, vision_config=vision, projection_dim=96)


def _siglip() -> Any:
    return hf.SiglipConfig(text_config={**ENCODER, "projection_size": 192}, vision_config=VISION)


def _gemma(make: Any) -> Any:
    return lambda: make(**{**DECODER, "num_attention_heads": 4, "head_dim": 32})


def _pixels(name: str, model: str, config: Any) -> Architecture:
    return Architecture(name, model, config, inputs=("pixels",), generates=False)


# Architecture, class of its MLPs, how many of them, and what is said of each.
GATED = "silu(gate_proj(x)) * up_proj(x)"
FUSED = [
    (BY_NAME["llama"], "LlamaMLP", 2, GATED),
    (BY_NAME["mistral"], "MistralMLP", 2, GATED),
    (Architecture("qwen2", "Qwen2ForCausalLM", lambda: hf.Qwen2Config(**DECODER)), "Qwen2MLP", 2, GATED),
    (BY_NAME["qwen3"], "Qwen3MLP", 2, GATED),
    (BY_NAME["gemma"], "GemmaMLP", 2, "gelu_tanh(gate_proj(x)) * up_proj(x)"),
    (
        Architecture("gemma2", "Gemma2ForCausalLM", _gemma(hf.Gemma2Config)),
        "Gemma2MLP",
        2,
        "gelu_tanh(gate_proj(x)) * up_proj(x)",
    ),
    (
        Architecture("gemma3", "Gemma3ForCausalLM", _gemma(hf.Gemma3TextConfig)),
        "Gemma3MLP",
        2,
        "gelu_tanh(gate_proj(x)) * up_proj(x)",
    ),
    (BY_NAME["gpt2"], "GPT2MLP", 2, "gelu_tanh(c_fc(x))"),
    (BY_NAME["gpt-neox"], "GPTNeoXMLP", 2, "gelu(dense_h_to_4h(x))"),
    (
        Architecture("phi", "PhiForCausalLM", lambda: hf.PhiConfig(**ENCODER)),
        "PhiMLP",
        2,
        "gelu_tanh(fc1(x))",
    ),
    (
        Architecture("nemotron", "NemotronForCausalLM", lambda: hf.NemotronConfig(**DECODER, hidden_act="relu")),
        "NemotronMLP",
        2,
        "relu(up_proj(x))",
    ),
    (BY_NAME["bert"], "BertIntermediate", 2, "gelu(dense(x))"),
    (BY_NAME["roberta"], "RobertaIntermediate", 2, "gelu(dense(x))"),
    (BY_NAME["t5"], "T5DenseGatedActDense", 4, "gelu_tanh(wi_0(x)) * wi_1(x)"),
    (
        Architecture("t5-relu", "T5ForConditionalGeneration", lambda: _t5("relu"), inputs=("ids", "decoder")),
        "T5DenseActDense",
        4,
        "relu(wi(x))",
    ),
    (BY_NAME["vit"], None, 2, None),  # its class has another name in other versions of transformers
    (_pixels("dinov2", "Dinov2ForImageClassification", lambda: hf.Dinov2Config(**VISION)), "Dinov2MLP", 2, None),
    (Architecture("clip-gelu", "CLIPModel", _gelu_clip, inputs=("ids", "pixels")), "CLIPMLP", 4, "gelu(fc1(x))"),
    (
        Architecture("siglip", "SiglipModel", _siglip, inputs=("ids", "pixels"), generates=False),
        "SiglipMLP",
        4,
        "gelu_tanh(fc1(x))",
    ),
]  # fmt: skip
NOT_FUSED = [
    pytest.param(BY_NAME["phi3"], id="phi3: one weight for gate and up"),
    pytest.param(BY_NAME["clip"], id="clip: quick_gelu is unknown"),
    pytest.param(BY_NAME["opt"], id="opt: no MLP module"),
]


def _converted(architecture: Architecture) -> Any:
    model = architecture.build()
    masks, _ = prune(model, architecture.block)
    convert(model, masks)
    return model


def _output(model: Any, architecture: Architecture) -> torch.Tensor:
    batch = architecture.batch()
    if isinstance(model, hf.SiglipModel):
        batch["input_ids"] = batch["input_ids"].clamp_max(VOCABULARY - 1)
    with torch.no_grad():
        output = model(**batch)
    return output.logits_per_text if hasattr(output, "logits_per_text") else output.logits


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each fused form runs."""
    counted: Counter[str] = Counter()
    gated, activated = library.gated, library.activated

    def count_gated(*args: Any) -> torch.Tensor:
        counted["gated"] += 1
        return gated(*args)

    def count_activated(*args: Any) -> torch.Tensor:
        counted["activated"] += bool(args[5])  # layers without activation go this way too
        return activated(*args)

    monkeypatch.setattr(library, "gated", count_gated)
    monkeypatch.setattr(library, "activated", count_activated)
    return counted


@pytest.fixture(scope="module")
def converted_llama() -> Any:
    return _converted(BY_NAME["llama"])


@pytest.fixture
def llama(converted_llama: Any) -> Any:
    return deepcopy(converted_llama)


@pytest.fixture
def mlp(llama: Any) -> Any:
    return llama.model.layers[0].mlp


def _compare(mlp: Any, counted: Counter[str], expected: int) -> None:
    """The MLP does what the unfused one does, with this many fused calls."""
    x = torch.randn(2, 5, 192)
    counted.clear()
    with torch.no_grad():
        actual = mlp(x)
        assert counted["gated"] == expected
        torch.testing.assert_close(actual, mlp.down_proj(mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x)))


@pytest.mark.parametrize(
    ("architecture", "name", "count", "said"), [pytest.param(*case, id=case[0].name) for case in FUSED]
)
def test_known_mlps_are_fused_and_compute_the_same(architecture, name, count, said, calls):
    model = _converted(architecture)
    fused = [module for module in model.modules() if isinstance(module, FusedMlp)]
    assert Counter(type(module).__name__ for module in fused)[f"Fused{name}"] == count or name is None
    assert said is None or said in repr(fused[0])
    actual = _output(model, architecture)
    assert calls["gated"] + calls["activated"] >= count
    calls.clear()
    unfuse(model)
    torch.testing.assert_close(actual, _output(model, architecture))
    assert not calls.total() and not any(isinstance(module, FusedMlp) for module in model.modules())


@pytest.mark.parametrize("architecture", NOT_FUSED)
def test_what_is_unknown_is_left_alone(architecture):
    assert not any(isinstance(module, FusedMlp) for module in _converted(architecture).modules())


def test_a_class_is_known_by_what_it_does():
    class Mlp(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = (BlockSparseLinear(16, 16, 8) for _ in range(3))
            self.f = nn.SiLU()

    class Named(Mlp):
        def forward(self, hidden):
            """Other names, the same function."""
            return self.c(self.f(self.a(hidden)) * self.b(hidden))

    class Swapped(Mlp):
        def forward(self, x):
            return self.c(self.a(x) * self.f(self.b(x)))

    class Scaled(Mlp):
        def forward(self, x):
            return self.c(self.f(self.a(x)) * self.b(x)) * 2

    class Twice(Mlp):
        def forward(self, x):
            return self.c(self.f(self.a(x)) * self.a(x))

    model = nn.ModuleList([Named(), Swapped(), Scaled(), Twice()])
    assert fuse(model) == ["0"]


def test_halves_must_both_be_sparse_and_the_activation_known(llama):
    unfuse(llama)
    first, second = (layer.mlp for layer in llama.model.layers)
    first.up_proj = first.up_proj.to_linear()
    second.act_fn = nn.Tanh()
    assert fuse(llama) == []


def test_switched_off(llama, monkeypatch):
    unfuse(llama)
    monkeypatch.setenv("SPARSIFY_FUSE", "0")
    assert fuse(llama) == []


def test_gradients_take_the_long_way(llama, calls):
    plain = deepcopy(llama)
    unfuse(plain)
    batch = BY_NAME["llama"].batch()
    losses = [model(**batch, labels=batch["input_ids"]).loss for model in (llama, plain)]
    for loss in losses:
        loss.backward()
    assert not calls.total() and losses[0].item() == losses[1].item()
    for own, other in zip(llama.parameters(), plain.parameters(), strict=True):
        assert torch.equal(own.grad, other.grad)


def test_frozen_layers_with_an_input_that_wants_a_gradient(llama, mlp, calls):
    llama.requires_grad_(False)
    x = torch.randn(3, 192, requires_grad=True)
    mlp(x).sum().backward()
    assert x.grad is not None and not calls.total()
    mlp(x.detach())
    assert calls["gated"] == 1


@pytest.mark.parametrize("child", ["gate_proj", "up_proj", "act_fn"])
@pytest.mark.parametrize("kind", ["register_forward_hook", "register_forward_pre_hook"])
def test_hooks_fire(mlp, calls, child, kind):
    seen = []
    handle = getattr(mlp.get_submodule(child), kind)(lambda *args: seen.append(args))
    _compare(mlp, calls, 0)
    assert len(seen) >= 1
    handle.remove()
    _compare(mlp, calls, 1)


def test_hooks_on_the_mlp_and_on_what_follows_fire(mlp, calls):
    seen = []
    mlp.register_forward_hook(lambda *_: seen.append("mlp"))
    mlp.down_proj.register_forward_hook(lambda *_: seen.append("down"))
    with torch.no_grad():
        mlp(torch.randn(1, 192))
    assert seen == ["down", "mlp"] and calls["gated"] == 1


def test_hooks_on_all_modules_fire(mlp, calls):
    seen = []
    handle = torch.nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(module))
    try:
        with torch.no_grad():
            mlp(torch.randn(1, 192))
    finally:
        handle.remove()
    assert mlp.gate_proj in seen and mlp.act_fn in seen and not calls.total()


def test_wrapped_layers_take_the_long_way(mlp, calls):
    class Doubling(ModelHook):
        def post_forward(self, module, output):
            return 2 * output

    x = torch.randn(4, 192)
    with torch.no_grad():
        before = mlp(x)
        add_hook_to_module(mlp.up_proj, Doubling())
        torch.testing.assert_close(mlp(x), 2 * before)
    assert calls["gated"] == 1


def test_replaced_parts_count(mlp, calls):
    mlp.act_fn = nn.ReLU()
    assert "fused: relu(" in repr(mlp)
    _compare(mlp, calls, 1)
    mlp.act_fn = nn.Tanh()
    assert "fused" not in repr(mlp)
    _compare(mlp, calls, 0)
    mlp.act_fn = nn.GELU("tanh")
    _compare(mlp, calls, 1)
    mlp.gate_proj = mlp.gate_proj.to_linear()
    _compare(mlp, calls, 0)


def test_wrong_width_is_the_layers_error(mlp):
    with torch.no_grad(), pytest.raises(ValueError, match="got 191 features, expected 192"):
        mlp(torch.randn(2, 191))


def test_lora_on_the_projections(llama, calls):
    peft = pytest.importorskip("peft")
    attach(llama)
    expected = _output(llama, BY_NAME["llama"])
    targets = ["gate_proj", "down_proj"]
    model = peft.get_peft_model(llama, peft.LoraConfig(r=4, target_modules=targets, init_lora_weights=False))
    calls.clear()
    with_adapter = _output(model, BY_NAME["llama"])
    assert not calls.total() and not torch.allclose(with_adapter, expected)
    merged = model.merge_and_unload()
    torch.testing.assert_close(_output(merged, BY_NAME["llama"]), with_adapter, rtol=1e-4, atol=1e-4)
    assert calls["gated"] == 2


def test_copies_and_pickles_are_fused_models_of_their_own(llama, calls):
    expected = _output(llama, BY_NAME["llama"])
    for copy in (deepcopy(llama), pickle.loads(pickle.dumps(llama))):
        calls.clear()
        assert type(copy.model.layers[1].mlp) is type(llama.model.layers[1].mlp)
        torch.testing.assert_close(_output(copy, BY_NAME["llama"]), expected)
        assert calls["gated"] == 2
        unfuse(copy)
    assert isinstance(llama.model.layers[0].mlp, FusedMlp)
    assert isinstance(llama.model.layers[0].mlp, hf.models.llama.modeling_llama.LlamaMLP)


def test_saved_loaded_and_made_dense_again(llama, calls, tmp_path):
    keys = set(llama.state_dict())
    expected = _output(llama, BY_NAME["llama"])
    folder = writer.save(llama, tmp_path / "sparse")
    loaded = hf.AutoModelForCausalLM.from_pretrained(folder)
    assert set(loaded.state_dict()) == keys
    calls.clear()
    torch.testing.assert_close(_output(loaded, BY_NAME["llama"]), expected)
    assert calls["gated"] == 2
    twin = dense_twin(loaded)
    assert not any(isinstance(module, FusedMlp) for module in twin.modules())
    assert sum(isinstance(module, FusedMlp) for module in loaded.modules()) == 2
    torch.testing.assert_close(_output(twin, BY_NAME["llama"]), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_compiles_whole_with_the_fused_operator(name):
    model, graphs = _converted(BY_NAME[name]), []
    batch = BY_NAME[name].batch()
    if "decoder_input_ids" in batch:
        batch["use_cache"] = False

    def backend(module, _):
        graphs.append(Counter(str(node.target) for node in module.graph.nodes))
        return module

    with torch.no_grad():
        expected = model(**batch).logits
        compiled = torch.compile(model, fullgraph=True, backend=backend)
        torch.testing.assert_close(compiled(**batch).logits, expected)
    assert graphs[0]["sparsify.gated"] == (2 if name == "llama" else 4)


def test_autocast(mlp):
    x = torch.randn(4, 192)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        fused, plain = mlp(x), mlp.down_proj(mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x))
    assert fused.dtype == plain.dtype == torch.bfloat16
    torch.testing.assert_close(fused, plain, rtol=0.05, atol=0.05)


def test_t5_keeps_its_last_layer_in_float32(calls):
    model = _converted(BY_NAME["t5"]).bfloat16()
    layers = [module for module in model.modules() if isinstance(module, FusedMlp)]
    x = torch.randn(3, 128, dtype=torch.bfloat16)
    for layer in layers:
        layer.wo.float()
        with torch.no_grad():
            fused = layer(x)
            torch.testing.assert_close(fused, layer.unfused.forward(layer, x), rtol=0.02, atol=0.02)
        assert fused.dtype == torch.float32
    assert calls["gated"] == 4


def test_dropout_still_drops(calls):
    model = _converted(Architecture("gpt2", "GPT2LMHeadModel", lambda: hf.GPT2Config(
        **TEXT, n_embd=192, n_head=6, n_layer=1, n_inner=760, n_positions=128, resid_pdrop=0.5)))  # fmt: skip
    mlp = model.transformer.h[0].mlp.train()
    with torch.no_grad():
        assert 0.3 < (mlp(torch.randn(64, 192)) == 0).float().mean() < 0.7
    assert calls["activated"] == 1
