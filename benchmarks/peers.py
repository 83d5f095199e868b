"""The same architecture from other packages: rotary positions, LayerNorm before each sublayer, SwiGLU, tied embeddings.
Each module maps ids, targets (B,T) to the mean loss, computed as the users of the package do."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Sizes:
    """The sizes of a model. ``hidden`` is the width of SwiGLU; ``vocab`` does not count the rows that pad the table."""

    vocab: int
    dim: int = 256
    layers: int = 4
    heads: int = 4
    context: int = 256
    hidden: int = 680


class LitGPT(nn.Module):
    """litgpt's GPT with the loss of its pretraining script, in chunks of 128 rows. As in the script, the model is
    compiled, but not the loss."""

    package = "litgpt"

    def __init__(self, sizes: Sizes):
        super().__init__()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # from its dependencies, at import
            from litgpt import GPT, Config
            from litgpt.utils import chunked_cross_entropy
        config = Config(
            name="same",
            block_size=sizes.context,
            vocab_size=sizes.vocab,
            padding_multiple=128,
            n_layer=sizes.layers,
            n_head=sizes.heads,
            n_embd=sizes.dim,
            intermediate_size=sizes.hidden,
            mlp_class_name="LLaMAMLP",
            norm_class_name="LayerNorm",
            parallel_residual=False,
            rotary_percentage=1.0,
            bias=False,
        )
        self.model, self.loss = GPT(config), chunked_cross_entropy
        self.model.apply(_normal)
        self.model.transformer.wte.weight = self.model.lm_head.weight

    def compile(self, **options: Any) -> None:
        self.model.compile(**options)

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        return self.loss(self.model(ids), targets)


class Transformers(nn.Module):
    """transformers' StableLM, which is a Llama with LayerNorm, with the loss of the model."""

    package = "transformers"

    def __init__(self, sizes: Sizes):
        super().__init__()
        from transformers import StableLmConfig, StableLmForCausalLM

        config = StableLmConfig(
            vocab_size=sizes.vocab,
            hidden_size=sizes.dim,
            intermediate_size=sizes.hidden,
            num_hidden_layers=sizes.layers,
            num_attention_heads=sizes.heads,
            num_key_value_heads=sizes.heads,
            max_position_embeddings=sizes.context,
            rope_parameters={"rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": 1.0},
            tie_word_embeddings=True,
            use_cache=False,
        )
        self.model = StableLmForCausalLM(config)

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        return self.model(input_ids=ids, labels=targets, shift_labels=targets).loss


class XTransformers(nn.Module):
    """x-transformers' decoder in its autoregressive wrapper. The wrapper takes the targets from the ids, so each
    row has one target fewer than with the others."""

    package = "x-transformers"

    def __init__(self, sizes: Sizes):
        super().__init__()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from x_transformers import AutoregressiveWrapper, Decoder, TransformerWrapper
        decoder = Decoder(
            dim=sizes.dim,
            depth=sizes.layers,
            heads=sizes.heads,
            attn_dim_head=sizes.dim // sizes.heads,
            rotary_pos_emb=True,
            rotary_emb_dim=sizes.dim // sizes.heads,
            attn_flash=True,
            ff_swish=True,
            ff_glu=True,
            ff_mult=sizes.hidden / sizes.dim,
            ff_no_bias=True,
        )
        net = TransformerWrapper(
            num_tokens=sizes.vocab,
            max_seq_len=sizes.context,
            attn_layers=decoder,
            use_abs_pos_emb=False,
            tie_embedding=True,
        )
        self.model = AutoregressiveWrapper(net)
        self.model.apply(_normal)

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        return self.model(ids)


PEERS = (LitGPT, Transformers, XTransformers)


def _normal(module: nn.Module) -> None:
    if isinstance(module, nn.Linear | nn.Embedding):
        torch.nn.init.normal_(module.weight, std=0.02)
