"""Architectures of transformers, in parts of the shelf: one file per family, which says what each config stands for,
and where its tensors are.

Four files register nothing, and help the others: ``entries`` (of a config, made of a model of ours), ``layouts`` and
``rotation`` (the parts that a config stands for), ``rules`` (which tensor is which). The order of the imports is that
of ``convert --list``; a model of ours is written as the first architecture that fits."""

# ruff: noqa: I001
from components.architecture.stablelm import StableLm
from components.architecture.llama import Llama, Mistral, Qwen2, Qwen3
from components.architecture.mixtral import Mixtral
from components.architecture.gemma import Gemma2
from components.architecture.cohere import Cohere
from components.architecture.phi import Phi
from components.architecture.neox import GPTNeoX
from components.architecture.starcoder import Starcoder2
from components.architecture.gpt2 import GPT2
from components.architecture.mpt import Mpt

__all__ = [
    "StableLm",
    "Llama",
    "Mistral",
    "Qwen2",
    "Qwen3",
    "Mixtral",
    "Gemma2",
    "Cohere",
    "Phi",
    "GPTNeoX",
    "Starcoder2",
    "GPT2",
    "Mpt",
]
