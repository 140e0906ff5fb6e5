"""What a pruned model folder can be used with, and what it saves: plain words and commands for its card."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

SAVES_NOTHING = (
    "The zeros are stored as ordinary dense numbers. This checkpoint takes the same disk space, memory and time as the "
    "dense one: unstructured zeros save neither memory nor time on today's hardware."
)
SAVES_WHEN_CONVERTED = (
    "The zeros are stored as ordinary dense numbers: as it is, this checkpoint takes the same disk space, memory and "
    "time as the dense one. Hardware and software that know an N:M pattern (2:4 today) can use it after a conversion."
)
SAVES_WHAT_IS_GONE = "What was removed whole is not stored: that part does save disk space, memory and time."
USES = """\
It is a plain Hugging Face folder, called `FOLDER` here:

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model, tokenizer = AutoModelForCausalLM.from_pretrained("FOLDER"), AutoTokenizer.from_pretrained("FOLDER")
```

```
lm_eval run --model hf --model_args pretrained=FOLDER --tasks piqa
vllm serve FOLDER                                                     # as a dense model
python llama.cpp/convert_hf_to_gguf.py FOLDER --outfile model.gguf    # as a dense model
```

besa-exp's tests load such folders with transformers and lm-eval; vLLM and llama.cpp were not tried."""
SEMI_STRUCTURED = """\
Its 2:4 zeros save time and memory where the linears are converted, on a CUDA device of compute capability 8.0 or more
and in 16 bits (besa-exp's tests do not cover this):

```python
import torch
from torch.sparse import to_sparse_semi_structured

model = model.to("cuda", torch.float16)
for linear in model.model.layers.modules():
    if isinstance(linear, torch.nn.Linear):
        linear.weight = torch.nn.Parameter(to_sparse_semi_structured(linear.weight))
```"""


def savings(results: Mapping[str, Any]) -> str:
    words = SAVES_NOTHING if results["pattern"] == "unstructured" else SAVES_WHEN_CONVERTED
    return words + (f" {SAVES_WHAT_IS_GONE}" if results.get("structure") else "")


def use_lines(results: Mapping[str, Any]) -> list[str]:
    """The card's section; 2:4 products where every linear of every block has them."""
    converts = results["pattern"] == "2:4" and not results.get("ignore")
    return ["## Use", "", USES, "", *([SEMI_STRUCTURED, ""] if converts else [])]
