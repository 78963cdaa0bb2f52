"""The model card of the quickstart's language model: what it is, how it was made, how well it does."""

from demo_corpus import Corpus


def describe(
    settings: dict[str, float],
    corpus: Corpus,
    results: dict[str, float],
    facts: dict[str, int],
    trained_on: str,
) -> str:
    """Return the card, Markdown.

    Args:
        settings: What the training was run with, by name.
        corpus: The text.
        results: ``heldout_perplexity``, ``heldout_bits_per_byte`` and ``validation_perplexity``.
        facts: ``parameters``, ``training tokens`` and ``tokens seen``.
        trained_on: Device, duration and versions, as a reader should see them.
    """
    choices = ", ".join(f"{name} {value}" for name, value in settings.items())
    return f"""---
license: other
license_name: psf-2.0
language: en
library_name: transformers
pipeline_tag: text-generation
---
# Quickstart language model

A Llama of {facts["parameters"] / 1e6:.1f} million parameters that writes sentences in the style of Python's \
documentation. It exists to be compressed in a quickstart and in tests: small, quick, and really trained, so \
that its loss tells something. It knows nothing and serves no other purpose.

| | |
|---|---|
| held-out perplexity, a token | {results["heldout_perplexity"]:.2f} |
| held-out bits a byte | {results["heldout_bits_per_byte"]:.3f} |
| validation perplexity, a token | {results["validation_perplexity"]:.2f} |
| training text | {len(corpus.texts["train"].encode()):,} bytes, {facts["training tokens"]:,} tokens |
| tokens seen in training | {facts["tokens seen"]:,} |
| training | {trained_on} |

Perplexities are those of the stored bfloat16 weights computed in float32, over windows of {settings["window"]} \
tokens that do not overlap, with an end token between passages. \
Longer inputs are beyond what the model has seen.

## How it was made

    python scripts/demo_model.py --out build/demo

Text: docstrings, help topics and comments of the standard library of {corpus.source}, collected by \
`scripts/demo_corpus.py`; SHA-256 fingerprint `{corpus.fingerprint}`. Held-out modules and topics are chosen \
by a hash of their names, share no paragraph with the training text, and took no part in any choice. \
Settings: {choices}.

Training runs with PyTorch's deterministic algorithms: equal text, settings, library versions and hardware \
give equal weights.

## Licence

The text is part of Python, copyright Python Software Foundation, used under the PSF License Version 2.
"""
