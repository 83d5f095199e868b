"""A model that was trained with a toolkit for ablations of small GPTs, as a model of the transformers library.

Shapes: B batch, T tokens, C model dim, V vocabulary."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from .configuration_toolkit import ToolkitConfig
from .parts_toolkit import PARTS, Context


class PartsCache:
    """The decoding caches of all layers.

    caches  for each layer, the tensors (B,...) of its mixer
    length  the number of tokens that they hold
    """

    is_compileable = False

    def __init__(self, caches: list[tuple[Tensor, ...]]):
        self.caches, self.length = caches, 0

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """The number of tokens in the cache."""
        return self.length

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Keep the rows ``beam_idx`` (B,) of the batch, in this order."""
        self.caches = [tuple(tensor.index_select(0, beam_idx) for tensor in layer) for layer in self.caches]


class ToolkitForCausalLM(PreTrainedModel, GenerationMixin):
    """ids (B,T) -> logits (B,T,V).

    The weights of the parts are float32 unless ``dtype`` says otherwise. Rows with padding are computed without a
    cache, with the padding moved to their ends; so every part works with padding on either side."""

    config_class = ToolkitConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _is_stateful = True  # the caches are those of the parts

    def __init__(self, config: ToolkitConfig):
        super().__init__(config)
        self.model = build(config)
        self.shared = _shared_names(self.model)
        self.post_init()
        self.all_tied_weights_keys = {f"model.{name}": f"model.{first}" for name, first in self.shared.items()}

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: PartsCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        return_dict: bool | None = None,
        num_items_in_batch: Tensor | int | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | tuple[Tensor, ...]:
        """Compute logits, and with ``labels`` (B,T) the loss.

        The loss is the mean cross-entropy, in nats, of each label that is not -100 and has a token before it, which is
        no padding; in training, the losses that parts add to it, such as load balancing, are included.
        ``num_items_in_batch`` is the number of labels of all micro-batches, by which the sum is divided then. A cache
        is returned only if ``use_cache`` is True. Raises ValueError for inputs that the parts can't compute."""
        if input_ids is None or inputs_embeds is not None:
            raise ValueError("this model needs input_ids: its parts embed the tokens themselves")
        if output_attentions or output_hidden_states:
            raise ValueError("this model returns no attention weights and no hidden states; use forward hooks")
        if past_key_values is not None and not isinstance(past_key_values, PartsCache):
            raise ValueError(
                f"past_key_values is a {type(past_key_values).__name__}; this model makes its own: give use_cache=True "
                "at first, and then the past_key_values of the output"
            )
        order = cache = None
        if attention_mask is not None and (torch.compiler.is_compiling() or not bool(attention_mask.all())):
            if past_key_values is not None:
                raise ValueError("this model computes rows with padding without a cache; leave out past_key_values")
            if attention_mask.shape != input_ids.shape:
                raise ValueError(
                    f"attention_mask has the shape {tuple(attention_mask.shape)}, but must have that of input_ids, "
                    f"{tuple(input_ids.shape)}"
                )
            order = attention_mask.long().argsort(dim=1, descending=True, stable=True)  # (B,T), padding at the end
            input_ids = input_ids.gather(1, order)
            if labels is not None:  # padding is computed after its row's tokens, so it must not predict one of them
                labels = torch.cat((labels[:, :1], labels[:, 1:].where(attention_mask[:, :-1].bool(), -100)), dim=1)
        else:
            _check_positions(position_ids, 0 if past_key_values is None else past_key_values.length)
            cache = past_key_values if past_key_values is not None or not use_cache else self.make_cache(len(input_ids))
        context = Context() if cache is None else self._continued(input_ids, cache)
        hidden, head = self.model(input_ids, context)
        if cache is not None:
            cache.length += input_ids.shape[1]
        if order is not None:
            hidden = hidden.gather(1, order.argsort(1)[:, :, None].expand_as(hidden))
        kept = slice(-logits_to_keep or None, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = head.logits(hidden[:, kept])
        loss = None
        if labels is not None:
            all_logits = logits if logits.shape[1] == labels.shape[1] else head.logits(hidden)
            loss = self._loss(all_logits, labels, context.losses if self.training else {}, num_items_in_batch)
        output = CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=cache)
        return output.to_tuple() if return_dict is False else output

    def make_cache(self, batch: int) -> PartsCache | None:
        """An empty cache for ``batch`` rows; None if a part of the model can't decode with a cache."""
        init_cache = getattr(self.model, "init_cache", None)
        caches = init_cache(batch) if init_cache else None
        return None if caches is None else PartsCache(caches)

    def initialize_weights(self, is_custom_init: bool = False) -> None:
        """Give all values that no file holds their initial ones: those of buffers that are not saved, and of
        parameters that a file lacks."""
        own = dict(self.model.named_parameters(remove_duplicate=False)) | dict(self.model.named_buffers())
        saved = self.model.state_dict()
        missing = [name for name, tensor in own.items() if not (name in saved and _is_loaded(tensor))]
        if not missing:
            return
        made = build(self.config)
        initial = dict(made.named_parameters(remove_duplicate=False)) | dict(made.named_buffers())
        with torch.no_grad():
            for name in missing:
                own[name].copy_(initial[name])

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        next_sequence_length: int | None = None,
        past_key_values: PartsCache | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """The arguments of ``forward`` for the next token: all tokens, unless a cache holds the earlier ones."""
        if past_key_values is None:
            next_sequence_length = None
        return super().prepare_inputs_for_generation(
            input_ids, next_sequence_length=next_sequence_length, past_key_values=past_key_values, **kwargs
        )

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False  # ``generate`` then makes no cache of its own

    def init_weights(self) -> None:
        """The parts fill their weights when they are built."""

    def tie_weights(self, *args: Any, **kwargs: Any) -> None:
        """Share again what the parts share, after the weights have been loaded one by one."""
        for name, first in self.shared.items():
            owner, _, attribute = name.rpartition(".")
            setattr(self.model.get_submodule(owner), attribute, self.model.get_parameter(first))

    def save_pretrained(self, save_directory: Any, *args: Any, state_dict: Any = None, **kwargs: Any) -> None:
        """Write config, weights and code. A parameter with several names is written under its first one."""
        tensors = self.state_dict() if state_dict is None else state_dict
        once = {name: tensor for name, tensor in tensors.items() if name not in self.all_tied_weights_keys}
        super().save_pretrained(save_directory, *args, state_dict=once, **kwargs)

    def get_input_embeddings(self) -> nn.Module:
        """The table of the tokens. Raises NotImplementedError if the model names none."""
        embed = getattr(self.model, "embed", None)
        if embed is None:
            raise NotImplementedError("this model has no attribute embed")
        return embed

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> nn.Module:
        """Raises ValueError: the parts have a fixed vocabulary."""
        raise ValueError("the vocabulary of this model is fixed; train with a tokenizer that has the tokens you need")

    def gradient_checkpointing_enable(self, *args: Any, **kwargs: Any) -> None:
        """Compute each block again for its gradients, which saves memory. Raises ValueError if the model can't."""
        if "recompute" not in vars(self.model):
            raise ValueError("this model can't recompute its blocks; leave out gradient_checkpointing")
        self.model.recompute = True

    def gradient_checkpointing_disable(self) -> None:
        """Keep the activations of all blocks."""
        if "recompute" in vars(self.model):
            self.model.recompute = False

    def _continued(self, ids: Tensor, cache: PartsCache) -> Context:
        """The context for tokens that follow those in a cache."""
        start = torch.tensor(cache.length, device=ids.device)
        return Context(cache=cache.caches, start=start, end=cache.length + ids.shape[1])

    @staticmethod
    def _loss(logits: Tensor, labels: Tensor, losses: dict[str, Tensor], items: Tensor | int | None) -> Tensor:
        targets = labels[:, 1:].flatten().to(logits.device)
        nats = F.cross_entropy(logits[:, :-1].float().flatten(0, 1), targets, ignore_index=-100, reduction="sum")
        count = (targets != -100).sum()
        total = nats + sum(losses.values()) * count
        return total / (count if items is None else items)


def build(config: ToolkitConfig) -> nn.Module:
    """Build the model with initial weights on the CPU: transformers would build it without values, but
    parts may compute with values in their constructors. Raises ValueError for a config without parts."""
    if config.root not in config.parts:
        raise ValueError(f"the config has no part {config.root!r}; it must have the entries of the config.json")
    classes: dict[str, type] = {}
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with torch.device("cpu"):
            model = _bound(config.root, config, classes)(config.vocab_size, config.max_position_embeddings)
    finally:
        torch.set_default_dtype(default)
    for parameter in model.parameters():  # transformers sets the default to the type that the caller asks for
        parameter.data = parameter.data.to(default) if parameter.is_floating_point() else parameter.data
    return model


def _bound(label: str, config: ToolkitConfig, classes: dict[str, type]) -> type:
    """The class of a part, which is built with the knobs of the config. A label always gives the same class."""
    if label not in classes:
        cls = PARTS[label.rpartition("/")[2]]
        knobs = {name: _decoded(value, config, classes) for name, value in config.parts[label].items()}

        def init(self: Any, *args: Any, **given: Any) -> None:
            cls.__init__(self, *args, **(knobs | given))

        about = {
            "__init__": init,
            "__module__": cls.__module__,
            "__qualname__": cls.__qualname__,
            "__doc__": cls.__doc__,
        }
        classes[label] = type(cls)(cls.__name__, (cls,), about)
    return classes[label]


def _decoded(value: Any, config: ToolkitConfig, classes: dict[str, type]) -> Any:
    """The value of a knob."""
    if isinstance(value, list):
        return [_decoded(each, config, classes) for each in value]
    if isinstance(value, dict) and list(value) == ["part"]:
        return _bound(value["part"], config, classes)
    if isinstance(value, dict) and list(value) == ["tuple"]:
        return tuple(_decoded(each, config, classes) for each in value["tuple"])
    if isinstance(value, dict) and list(value) == ["items"]:
        return {_decoded(key, config, classes): _decoded(each, config, classes) for key, each in value["items"]}
    return value


def _shared_names(model: nn.Module) -> dict[str, str]:
    """{name: first name} of the parameters that have several names."""
    first_names: dict[int, str] = {}
    names = model.named_parameters(remove_duplicate=False)
    firsts = [(name, first_names.setdefault(id(parameter), name)) for name, parameter in names]
    return {name: first for name, first in firsts if name != first}


def _is_loaded(tensor: Tensor) -> bool:
    """Whether transformers has put a value from a file into a parameter or buffer."""
    return getattr(tensor, "_is_hf_initialized", False)


def _check_positions(position_ids: Tensor | None, start: int) -> None:
    """Raise ValueError for positions that are not start, start + 1, ...: several texts packed into one row."""
    if position_ids is None or torch.compiler.is_compiling():
        return
    if not torch.equal(
        position_ids, (start + torch.arange(position_ids.shape[-1])).to(position_ids).expand_as(position_ids)
    ):
        raise ValueError("this model needs consecutive position_ids; give each text a row of its own")
