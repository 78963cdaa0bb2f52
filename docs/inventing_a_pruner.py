# %% [markdown]
# # Inventing a pruner
#
# From an idea to a checkpoint, on the small language model in `recipes/demo`. Cell by cell in any editor that knows
# `# %%`, or all at once from the repository's root, in two minutes on one core:
#
#     python docs/inventing_a_pruner.py
#
# Numbers in the text are of Python 3.11's text, torch 2.13, CPU.

# %%
from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import sparsify
from sparsify import BlockMask, BlockShape, Pruner, plots, quality
from sparsify.blocks import to_blocks
from sparsify.data import spec as data

ROOT = Path(__file__).resolve().parents[1]
parser = argparse.ArgumentParser()
parser.add_argument(
    "--corpus", type=Path, default=ROOT / "build" / "corpus", help="folder of the text; made if missing"
)
parser.add_argument("--images", type=Path, default=ROOT / "docs" / "images", help="folder for the pictures")
parser.add_argument(
    "--fast", action="store_true", help="little data and few points, to see that everything runs"
)
options, _ = parser.parse_known_args()

# %% [markdown]
# ## A model and something to measure it by
#
# Every choice below is made on `validation.txt`; `heldout.txt` is for the last table alone. Calibration data are
# passages of the training text.

# %%
if not (options.corpus / "train.txt").exists():
    sys.path.insert(0, str(ROOT / "scripts"))
    import demo_corpus

    demo_corpus.write(demo_corpus.collect(), options.corpus)

DEMO, BLOCK = ROOT / "recipes" / "demo", BlockShape(32, 32)
tokenizer = AutoTokenizer.from_pretrained(DEMO)
LENGTH, SAMPLES, CALIBRATION = (64, 2, 8) if options.fast else (512, 24, 64)


def text(part: str, length: int, samples: int):
    """Samples of one part of the text, each `length` tokens."""
    source = data.DataSpec(path=options.corpus / f"{part}.txt", length=length, samples=samples)
    return data.causal_blocks(source, tokenizer)


validation, heldout = text("validation", LENGTH, SAMPLES), text("heldout", LENGTH, SAMPLES)
train = text("train", LENGTH // 2, CALIBRATION)
calibration = [{"input_ids": train[start : start + 8]["input_ids"]} for start in range(0, len(train), 8)]


def load():
    """The dense model, fresh."""
    return AutoModelForCausalLM.from_pretrained(DEMO, dtype=torch.float32)


def perplexity(model, samples=validation) -> float:
    """Perplexity a token; the lower the better."""
    return quality.perplexity(model, samples)["perplexity"]


dense = perplexity(load())
print(f"dense: {dense:.1f}")

# %% [markdown]
# The dense model has 22.3. Magnitude, the pruner that needs no data, ruins it: with three tenths of the blocks gone the
# perplexity is above a thousand.

# %%
model = load()
sparsify.prune(model, method="magnitude", block=BLOCK, sparsity=0.3)
print(f"magnitude, 30 % removed: {perplexity(model):.1f}")

# %% [markdown]
# ## The idea
#
# What matters is not how large a block's weights are but what its removal does to the layer's output. For inputs `x`
# with second moments `H = E[x x^T]`, the block `W_B` over the columns `B` contributes `W_B x_B`, and without it the
# output is wrong by
#
#     E ||W_B x_B||^2 = tr(W_B H_BB W_B^T)
#
# which also knows that the inputs within a block go together. Divided by the energy of the whole output,
# `tr(W H W^T)`, it can be compared across layers. Calibration collects `H` for whoever names it in `requires`.

# %%


class OutputShare(Pruner):
    """Share of a layer's output that a block is responsible for."""

    requires = frozenset({"hessian"})

    def score(self, layer):
        weight, hessian = layer.weight.float(), layer.statistics["hessian"]
        blocks, side = to_blocks(weight, layer.block), layer.block.cols  # (R, C, bo, bi)
        inputs = (
            to_blocks(hessian, BlockShape(side, side)).diagonal(dim1=0, dim2=1).permute(2, 0, 1)
        )  # (C, bi, bi)
        lost = torch.einsum("rcoi,cij,rcoj->rc", blocks, inputs, blocks)
        return lost / (weight @ hessian * weight).sum()


# %% [markdown]
# In Python a method is a name or a class; on the command line this one would be `my_pruners:OutputShare`, if it stood
# in `my_pruners.py`.

# %%
methods = {"magnitude": "magnitude", "wanda": "wanda", "output share": OutputShare}
curves: dict[str, dict[float, float]] = {label: {0.0: dense} for label in methods}
for label, method in methods.items():
    for sparsity in (0.3,) if options.fast else (0.1, 0.2, 0.3, 0.4, 0.5):
        model = load()
        sparsify.prune(model, method=method, block=BLOCK, sparsity=sparsity, calibration=calibration)
        curves[label][sparsity] = perplexity(model)
        print(f"{label}, {sparsity:.0%} removed: {curves[label][sparsity]:.1f}")
options.images.mkdir(parents=True, exist_ok=True)
picture = options.images / "inventing-quality.png"
plots.quality_by_sparsity(curves, picture, quality="validation perplexity", dense=dense, log=True)

# %% [markdown]
# ![Perplexity against sparsity](images/inventing-quality.png)
#
# At 30 % it comes to 83, as Wanda does (82) and far from magnitude (1,334); at 50 % to 182 where Wanda has 649. The
# correlations begin to matter once much is removed.
#
# ## Where it cuts
#
# One budget for all layers compares their scores. The picture shows what comes of that: attention is kept nearly whole,
# while the gates fall to the floor of their density. Each of their many blocks is a small share of its layer's output.

# %%
model = load()
result = sparsify.prune(model, method=OutputShare, block=BLOCK, sparsity=0.3, calibration=calibration)
plots.mask_pictures(result.masks, options.images / "inventing-masks.png", columns=7)
print(result)

# %% [markdown]
# ![The masks](images/inventing-masks.png)
#
# ## A scope
#
# Attention may be worth more than the rest, but surely not everything. A scope says how dense each layer shall be, and
# `budget.fit` makes that fit the budget.

# %%


def attention_first(layers, scores, budget):
    """Attention layers keep twice as much as feed-forward ones."""
    return budget.fit(layers, [2.0 if "self_attn" in layer.name else 1.0 for layer in layers])


found = {}
for scope in (attention_first,) if options.fast else ("global", "layer", "row", attention_first):
    model = load()
    sparsify.prune(model, method=OutputShare, block=BLOCK, sparsity=0.3, scope=scope, calibration=calibration)
    found[scope if isinstance(scope, str) else scope.__name__] = perplexity(model)
print("30 % removed:", {label: round(value, 1) for label, value in found.items()})

# %% [markdown]
# That halves the perplexity: 40, where one budget gave 83. But `row`, which takes the same number of blocks from
# every block row of every layer, has 41 without any opinion about attention. Perhaps no output unit should lose much
# more than its neighbours.
#
# ## A loop of one's own
#
# Both at once is no scope any more. `sparsify.score` gives every layer with its scores, the masks are ours to make, and
# `sparsify.apply` prunes with them.

# %%
model, masks = load(), {}
for layer, scores in sparsify.score(model, method=OutputShare, block=BLOCK, calibration=calibration):
    share = 0.85 if "self_attn" in layer.name else 0.65
    best = scores.topk(round(share * scores.shape[1]), dim=1).indices  # of each block row
    keep = torch.zeros_like(scores, dtype=torch.bool).scatter_(1, best, True)
    masks[layer.name] = BlockMask(keep, layer.shape, layer.block)
result = sparsify.apply(model, masks)
print(f"balanced rows, more of attention, {result.sparsity:.1%} removed: {perplexity(model):.1f}")

# %% [markdown]
# That is 34.
#
# ## Pack and save
#
# The model is block-sparse since `apply`: what is saved holds the kept blocks alone and loads like any other. Last, the
# number that counts, on text that took no part in any choice, beside the second-order pruner of the package, which also
# adjusts the weights that stay.

# %%
with tempfile.TemporaryDirectory() as folder:
    sparse = sparsify.save(model.to(torch.bfloat16), Path(folder) / "sparse", processor=tokenizer)
    sizes = [(path / "model.safetensors").stat().st_size for path in (DEMO, sparse)]
    print(f"bytes on disk: {sizes[0]:,} dense, {sizes[1]:,} sparse")
    ours = AutoModelForCausalLM.from_pretrained(sparse, dtype=torch.float32)
second, steps = load(), 1 if options.fast else 32
sparsify.prune(
    second, method="block_obs", block=BLOCK, sparsity=result.sparsity, calibration=calibration, steps=steps
)
table = {"dense": load(), "ours": ours, "block_obs": second}
print("held out:", {label: round(perplexity(each, heldout), 1) for label, each in table.items()})

# %% [markdown]
# Held out, with 29 % of these weights removed: dense 21.1, ours 32.3, `block_obs` 21.2. An idea of ten lines and a loop
# of five take the damage from ruin to half as bad again, without any training; adjusting the weights that stay undoes
# nearly all of the rest. So that would be the next thing to write: `update_weights` in [pruners.md](pruners.md).
