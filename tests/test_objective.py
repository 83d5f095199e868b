"""Model and loss as one module: documents, auxiliary losses, and a config that masks documents."""

from pathlib import Path

import pytest
import torch
from conftest import tiny_gpt
from runs import SMALL, rows, small_run

from components.attention import SDPA
from components.block import HyperConnections
from components.ffn import GELU, MixtureOfExperts
from components.loss import CrossEntropy
from components.mixer import ValueResidual
from toolkit import run
from toolkit.objective import Objective, documents

EOT = 7


def test_documents_are_numbered_and_positions_restart_after_each_end():
    positions, index = documents(torch.tensor([[1, 2, EOT, 3, EOT, EOT, 4], [1, 1, 1, 1, 1, 1, EOT]]), EOT)
    assert index.tolist() == [[0, 0, 0, 1, 1, 2, 3], [0] * 7]
    assert positions.tolist() == [[0, 1, 2, 0, 1, 0, 0], [0, 1, 2, 3, 4, 5, 6]]


def test_a_document_reads_as_if_it_stood_alone():
    model = tiny_gpt(attention=SDPA).eval()
    first, second = torch.randint(8, 50, (1, 5)), torch.randint(8, 50, (1, 9))
    ids = torch.cat((first, torch.tensor([[EOT]]), second), dim=1)
    targets = torch.full_like(ids, -100)
    targets[:, 6:] = torch.randint(0, 50, (1, 9))
    together = Objective(model, CrossEntropy(), EOT)(ids, targets)[1]
    alone = Objective(model, CrossEntropy())(second, targets[:, 6:])[1]
    assert torch.allclose(together, alone, rtol=1e-5)
    assert not torch.allclose(Objective(model, CrossEntropy())(ids, targets)[1], alone, rtol=1e-3)


def test_auxiliary_losses_weigh_by_targets_so_that_micro_batches_add_up():
    class Balanced(GELU):
        def forward(self, x, context):
            context.losses["balance"] = context.losses.get("balance", 0.0) + 0.5
            context.metrics["ffn/balance"] = torch.tensor(0.5)
            return super().forward(x, context)

    objective = Objective(tiny_gpt(ffn=Balanced), CrossEntropy())
    ids = torch.randint(0, 50, (4, 8))
    targets = torch.randint(0, 50, (4, 8))
    targets[0, :5] = -100
    total, nats, count, metrics = objective(ids, targets)
    assert torch.allclose(total, nats + 2 * 0.5 * count) and metrics["ffn/balance"] == 0.5
    halves = [objective(ids[rows], targets[rows])[0] for rows in (slice(0, 1), slice(1, 4))]
    assert torch.allclose(sum(halves), total, rtol=1e-5)


def test_a_run_can_mask_documents(tmp_path):
    bindings = ("Experiment.mask_documents = True",)
    assert small_run(tmp_path, "masked", overlays=("gin/attention/sdpa.gin",), bindings=bindings) == 0
    assert small_run(tmp_path, "plain", overlays=("gin/attention/sdpa.gin",)) == 0
    masked, plain = rows(tmp_path / "masked"), rows(tmp_path / "plain")
    assert masked[-1]["val/loss_nats"] < masked[0]["val/loss_nats"] and masked != plain


STRANGER = """\
from torch import nn

from toolkit.model import Head
from toolkit.registry import register


@register("model")
class {name}(nn.Module):
    {declared}

    def __init__(self, vocab_size, max_len):
        super().__init__()
        self.max_len, self.table = max_len, nn.Embedding(vocab_size, 8)

    def forward(self, ids, context=None):
        return self.table(ids), Head(self.table.weight, self.table.num_embeddings, None)
"""


def run_strangers_model(folder: Path, name: str, declared: str) -> int:
    """A model without mixers and without a cache, with ``mask_documents``: its file, and the exit code of its run."""
    (folder / f"{name.lower()}.py").write_text(STRANGER.format(name=name, declared=declared))
    own = (f"Experiment.model = @{name}", "Experiment.mask_documents = True")
    flags = [flag for key in (*SMALL, *own) if not key.startswith("GPT.") for flag in ("-p", key)]
    flags = ["gin/model/tiny.gin", *flags]
    return run.main([*flags, "--import", str(folder / f"{name.lower()}.py"), "--runs", str(folder), "--name", name])


def test_a_model_that_does_not_declare_that_it_keeps_documents_apart_is_refused(tmp_path):
    with pytest.raises(ValueError, match="Silent does not declare whether it keeps documents apart; give it an attr"):
        run_strangers_model(tmp_path, "Silent", "mixers = []")
    assert not (tmp_path / "Silent").exists()


def test_a_model_without_mixers_may_declare_that_it_keeps_documents_apart(tmp_path):
    assert run_strangers_model(tmp_path, "Declares", "supports = {'documents'}") == 0
    assert (tmp_path / "Declares" / "samples.md").read_text()


def run_recomputed(recompute, **slots):
    """(gradients, bytes that the forward pass keeps, parameters apart)."""
    torch.manual_seed(0)
    model = tiny_gpt(n_layer=4, dropout=0.1, recompute=recompute, **slots)
    objective, kept = Objective(model, CrossEntropy()), {}
    ids = torch.randint(0, 50, (2, 32), generator=torch.Generator().manual_seed(0))
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    def note(tensor):
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    torch.manual_seed(1)  # dropout
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss = objective(ids, ids)[0]
    loss.backward()
    gradients = [parameter.grad for parameter in model.parameters()]
    return gradients, sum(size for pointer, size in kept.items() if pointer not in own)


@pytest.mark.parametrize(
    "slots",
    [dict(), dict(mixer=ValueResidual, ffn=MixtureOfExperts), dict(block=HyperConnections)],
    ids=["default", "shared values and losses", "a block that reads what the last layer shared"],
)
def test_blocks_computed_again_give_the_same_gradients_and_keep_less(slots):
    plain, again = (run_recomputed(recompute, **slots) for recompute in (False, True))
    assert all(torch.equal(one, other) for one, other in zip(plain[0], again[0], strict=True))
    assert again[1] < 0.5 * plain[1]
