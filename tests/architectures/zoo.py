"""Small models of many architectures, with the quirks of the large ones: few key heads, odd widths, tied weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers as hf
from torch import Tensor, nn

from sparsify.allocation.budget import allocate
from sparsify.blocks import BlockMask, BlockShape
from sparsify.pruner import create_pruner
from sparsify.targets import Selection, select

VOCABULARY = 331  # no width of a layer
# Special tokens inside the small vocabulary; no end token, so that every generated text is of full length.
TEXT = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}
# Grouped-query attention; 344 and 500 are no multiples of the blocks.
DECODER = {
    **TEXT,
    "hidden_size": 192,
    "intermediate_size": 344,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
ENCODER = {
    **TEXT,
    "hidden_size": 192,
    "intermediate_size": 500,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "max_position_embeddings": 128,
}
VISION = {
    "hidden_size": 192,
    "intermediate_size": 500,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "image_size": 32,
    "patch_size": 8,
}
STAGES = {"embedding_size": 32, "hidden_sizes": [64, 96, 192, 384]}
EXPERTS = {
    **DECODER,
    "hidden_size": 128,
    "num_attention_heads": 4,
    "num_experts_per_tok": 2,
    "num_local_experts": 4,
}


@dataclass(frozen=True)
class Architecture:
    """One architecture of the tests.

    Attributes:
        name: Name of the case.
        model_class: transformers' class to build.
        config: Makes its config.
        auto_class: The Auto class that loads it.
        block: Block shape to prune in.
        inputs: Kinds of input: `ids`, `pixels`, `features`, `decoder`.
        generates: Whether `generate` applies.
        routed: Whether tokens are routed to experts, so that rounding can change the path they take.
    """

    name: str
    model_class: str
    config: Callable[[], Any]
    auto_class: str = "AutoModelForCausalLM"
    block: str = "32x32"
    inputs: tuple[str, ...] = ("ids",)
    generates: bool = True
    routed: bool = False

    def build(self) -> Any:
        """The dense model in evaluation mode, weights spread enough for its outputs to depend on them."""
        torch.manual_seed(0)
        model = getattr(hf, self.model_class)(self.config()).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 1:
                    parameter.add_(0.1 * torch.randn_like(parameter))
        _settle(model, self.batch())
        return model

    def load(self, folder: Any, **options: Any) -> Any:
        """`from_pretrained` of the plain Auto class."""
        return getattr(hf, self.auto_class).from_pretrained(folder, **options)

    def batch(self, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
        """Inputs of a forward pass."""
        generator = torch.Generator().manual_seed(1)
        batch: dict[str, Tensor] = {}
        if "ids" in self.inputs:
            batch["input_ids"] = torch.randint(3, VOCABULARY, (2, 13), generator=generator)
            batch["attention_mask"] = torch.ones_like(batch["input_ids"])
            batch["attention_mask"][0, :4] = 0  # left padding
        if "pixels" in self.inputs:
            batch["pixel_values"] = torch.randn(2, 3, 32, 32, generator=generator).to(dtype)
        if "features" in self.inputs:
            batch["input_features"] = torch.randn(2, 80, 100, generator=generator).to(dtype)
        if "decoder" in self.inputs:
            batch["decoder_input_ids"] = torch.randint(3, VOCABULARY, (2, 7), generator=generator)
        return batch


@torch.no_grad()
def _settle(model: Any, batch: dict[str, Tensor]) -> None:
    """Gives batch norms the statistics of a batch: with those of a new model, deep ones put out nothing but zeros."""
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 1.0
    if norms:
        model.train()(**batch)
        model.eval()
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum


def _clip() -> Any:
    text = {**ENCODER, "projection_dim": 96, "eos_token_id": 2}
    return hf.CLIPConfig(text_config=text, vision_config={**VISION, "projection_dim": 96}, projection_dim=96)


def _t5() -> Any:
    return hf.T5Config(
        vocab_size=VOCABULARY, d_model=128, d_kv=40, num_heads=4, d_ff=344, num_layers=2, num_decoder_layers=2,
        feed_forward_proj="gated-gelu", decoder_start_token_id=0, pad_token_id=0, eos_token_id=None,
    )  # fmt: skip


def _whisper() -> Any:
    return hf.WhisperConfig(
        **TEXT, d_model=192, encoder_layers=2, decoder_layers=2, encoder_attention_heads=6, decoder_attention_heads=6,
        encoder_ffn_dim=500, decoder_ffn_dim=500, max_source_positions=50, max_target_positions=64, num_mel_bins=80,
        decoder_start_token_id=1, begin_suppress_tokens=None,
    )  # fmt: skip


ARCHITECTURES = [
    Architecture("llama", "LlamaForCausalLM", lambda: hf.LlamaConfig(**DECODER, tie_word_embeddings=True)),
    Architecture(
        "qwen3",
        "Qwen3ForCausalLM",
        lambda: hf.Qwen3Config(
            **{**DECODER, "hidden_size": 256, "num_attention_heads": 8, "intermediate_size": 704}, head_dim=40
        ),
    ),
    Architecture("mistral", "MistralForCausalLM", lambda: hf.MistralConfig(**DECODER, sliding_window=8)),
    Architecture(
        "gemma",
        "GemmaForCausalLM",
        lambda: hf.GemmaConfig(
            **{**DECODER, "num_attention_heads": 4, "num_key_value_heads": 1, "intermediate_size": 500},
            head_dim=64,
        ),
        block="64x64",
    ),
    Architecture("phi3", "Phi3ForCausalLM", lambda: hf.Phi3Config(**{**DECODER, "intermediate_size": 350})),
    Architecture(
        "gpt2",
        "GPT2LMHeadModel",
        lambda: hf.GPT2Config(**TEXT, n_embd=192, n_head=6, n_layer=2, n_inner=760, n_positions=128),
        block="64x64",
    ),
    Architecture(
        "gpt-neox",
        "GPTNeoXForCausalLM",
        lambda: hf.GPTNeoXConfig(**{**ENCODER, "intermediate_size": 760}),
        block="32x64",
    ),
    Architecture(
        "opt",
        "OPTForCausalLM",
        lambda: hf.OPTConfig(**{**ENCODER, "ffn_dim": 500}, word_embed_proj_dim=128),
    ),
    Architecture(
        "bert",
        "BertForMaskedLM",
        lambda: hf.BertConfig(**ENCODER),
        "AutoModelForMaskedLM",
        block="64x32",
        generates=False,
    ),
    Architecture(
        "roberta",
        "RobertaForSequenceClassification",
        lambda: hf.RobertaConfig(**ENCODER),
        "AutoModelForSequenceClassification",
        generates=False,
    ),
    Architecture(
        "distilbert",
        "DistilBertForMaskedLM",
        lambda: hf.DistilBertConfig(**TEXT, dim=192, hidden_dim=500, n_layers=2, n_heads=6),
        "AutoModelForMaskedLM",
        block="32x16",
        generates=False,
    ),
    Architecture(
        "t5",
        "T5ForConditionalGeneration",
        _t5,
        "AutoModelForSeq2SeqLM",
        inputs=("ids", "decoder"),
    ),
    Architecture(
        "vit",
        "ViTForImageClassification",
        lambda: hf.ViTConfig(**VISION),
        "AutoModelForImageClassification",
        inputs=("pixels",),
        generates=False,
    ),
    Architecture(
        "whisper",
        "WhisperForConditionalGeneration",
        _whisper,
        "AutoModelForSpeechSeq2Seq",
        inputs=("features", "decoder"),
    ),
    Architecture("clip", "CLIPModel", _clip, "AutoModel", inputs=("ids", "pixels"), generates=False),
    Architecture(
        "mixtral",
        "MixtralForCausalLM",
        lambda: hf.MixtralConfig(**{**EXPERTS, "intermediate_size": 248}),
        block="16x16",
        routed=True,
    ),
    Architecture(
        "qwen3-moe",
        "Qwen3MoeForCausalLM",
        lambda: hf.Qwen3MoeConfig(
            **{key: value for key, value in EXPERTS.items() if key != "num_local_experts"},
            num_experts=4,
            moe_intermediate_size=248,
            mlp_only_layers=[0],
            head_dim=32,
        ),
        block="16x16",
        routed=True,
    ),
    *(
        Architecture(
            name,
            f"{model}ForImageClassification",
            config,
            "AutoModelForImageClassification",
            block=block,
            inputs=("pixels",),
            generates=False,
        )
        for name, model, config, block in (
            (
                "resnet",
                "ResNet",
                lambda: hf.ResNetConfig(**STAGES, depths=[2, 1, 1, 1], layer_type="basic"),
                "32x32",
            ),
            (
                "resnet-bottleneck",
                "ResNet",
                lambda: hf.ResNetConfig(hidden_sizes=[64, 128, 256, 512], depths=[1, 2, 1, 1]),
                "16x16",
            ),
            (
                "convnext",
                "ConvNext",
                lambda: hf.ConvNextConfig(hidden_sizes=STAGES["hidden_sizes"], depths=[1, 1, 2, 1]),
                "32x16",
            ),
            ("mobilenet-v2", "MobileNetV2", lambda: hf.MobileNetV2Config(depth_multiplier=1.0), "8x16"),
            (
                "regnet",
                "RegNet",
                lambda: hf.RegNetConfig(**STAGES, depths=[1, 1, 1, 1], groups_width=16),
                "8x8",
            ),
        )
    ),
]
BY_NAME = {architecture.name: architecture for architecture in ARCHITECTURES}


def prune(model: Any, block: str, sparsity: float = 0.5) -> tuple[dict[str, BlockMask], Selection]:
    """Zeroes half of every layer of the model's blocks, by magnitude, and leaves the layers dense.

    Returns:
        The masks and what was selected.
    """
    selection = select(model, BlockShape.parse(block))
    pruner = create_pruner("magnitude")
    scores = {layer.name: pruner.score(layer) for layer in selection.layers}
    masks = allocate(scores, {layer.name: layer for layer in selection.layers}, sparsity, "layer")
    for layer in selection.layers:
        layer.weight.mul_(masks[layer.name].elements().to(layer.weight.device))
    return masks, selection
