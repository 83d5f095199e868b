"""The config of a model that was trained with a toolkit for ablations of small GPTs."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig


class ToolkitConfig(PreTrainedConfig):
    """The parts of a model with their knobs, and its sizes.

    parts                    {label: {knob: value}} of each part. A label is the name of a class, after SCOPE/ if the
                             model has several parts of this class. A value {"part": label} is another part, and
                             {"tuple": [...]} is a tuple
    root                     the label of the model
    vocab_size               number of ids
    max_position_embeddings  the longest context in tokens

    ``hidden_size``, ``num_hidden_layers`` and ``num_attention_heads`` repeat knobs of the model, for programs that look
    for them here; None if the model has no such knobs."""

    model_type = "toolkit_gpt"
    keys_to_ignore_at_inference = ["past_key_values"]

    def __init__(
        self,
        parts: dict[str, dict[str, Any]] | None = None,
        root: str = "GPT",
        vocab_size: int = 0,
        max_position_embeddings: int = 0,
        hidden_size: int | None = None,
        num_hidden_layers: int | None = None,
        num_attention_heads: int | None = None,
        use_cache: bool = True,
        **entries: Any,
    ):
        self.parts, self.root = parts or {}, root
        self.vocab_size, self.max_position_embeddings = vocab_size, max_position_embeddings
        self.hidden_size, self.num_hidden_layers = hidden_size, num_hidden_layers
        self.num_attention_heads, self.use_cache = num_attention_heads, use_cache
        entries.setdefault("tie_word_embeddings", False)  # the model itself ties its tables
        super().__init__(**entries)
