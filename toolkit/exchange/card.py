"""The README.md of a model that goes out: what it is, what it was trained on, and how to load it."""

from __future__ import annotations

from collections.abc import Sequence

from toolkit.compose import Run
from toolkit.exchange.proof import Proof
from toolkit.store import checkpoint, factsfile

CARD = """\
---
library_name: transformers
pipeline_tag: text-generation
---

# {name}

A {parameters} language model of the architecture `{model_type}`, {made} a toolkit for ablations of small GPTs.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{folder}"{trust})
tokenizer = AutoTokenizer.from_pretrained("{folder}")
```

{code}| | |
|---|---|
{rows}

{prompts}## Proof

In a new process, transformers loaded these files and gave the results of the toolkit's own model: {proof}.
Compared were random and real text of different lengths, with and without a cache.

## Config

The toolkit's own config{repeats}:

```
{config}```
"""

PROMPTS = """\
Texts were trained as documents that each follow the end-of-text token, so begin a prompt with it
(`tokenizer.bos_token`) to continue a new document.

"""


CODE = """\
The Python files in this folder are the parts of this model, copied from the toolkit and from its author's own files.
`trust_remote_code=True` runs them: read them first. They need torch and transformers{packages}.

"""


def write_card(
    run: Run, model_type: str, dtype: str, proof: Proof, folder: str, packages: Sequence[str] | None = None
) -> str:
    """The text of the README.md. ``packages``: what the code in the folder needs besides torch and transformers; None:
    the folder has no code."""
    facts = factsfile.read(checkpoint.find(run.checkpoint)[0])
    manifest = checkpoint.read_manifest(run.checkpoint)
    counts = facts.get("parameters")
    total = counts["total"] if counts else sum(p.numel() for p in run.model.parameters())
    step, tokens, steps = manifest.get("step", 0), facts.get("tokens"), facts.get("steps")
    rows = {
        "parameters": f"{total:,}",
        "context": f"{run.experiment.seq_len:,} tokens",
        "vocabulary": f"{run.tokenizer.vocab_size:,} ({type(run.tokenizer).__name__})",
        "type of the weights": dtype,
    }
    came_in = "data" not in facts and facts.get("from")  # ``convert`` made the run of another model
    if came_in:
        rows["weights"] = f"those of {came_in}, not trained here; data and licence not known"
    else:
        data = f"{run.experiment.data.__name__} (fingerprint {facts.get('data', 'unknown')[:12]})"
        rows["data"] = f"{data}, licence not known"
        rows["training"] = f"step {step:,} of {steps:,}" if steps else f"step {step:,}"
    if tokens and steps and not came_in:
        rows["training"] += f", {round(tokens * step / steps):,} tokens"
    for metric, value in facts.get("final", {}).items():
        if "loss" in metric and isinstance(value, float):
            rows[f"{metric} at the end of the run"] = f"{value:.4f}"
    return CARD.format(
        name=facts.get("name", folder),
        parameters=f"{total / 1e6:,.1f}M" if total >= 1e5 else f"{total:,}-parameter",
        model_type=model_type,
        made="converted by" if came_in else "trained with",
        prompts="" if came_in else PROMPTS,
        repeats="" if came_in else ", with which it repeats the training",
        folder=folder,
        trust="" if packages is None else ", trust_remote_code=True",
        code="" if packages is None else CODE.format(packages="".join(f", {each}" for each in packages)),
        rows="\n".join(f"| {key} | {value} |" for key, value in rows.items()),
        proof=proof,
        config=run.config.text,
    )
