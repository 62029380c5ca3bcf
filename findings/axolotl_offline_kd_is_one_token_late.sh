#!/usr/bin/env bash
# Guess before running: Axolotl trains on the log-probs of a data set (its `kd` integration) so that a student whose
# distributions are the teacher's own has no loss left. In axolotl 0.19.0 the data side puts the row about token i at
# place i, and says that the trainer shifts; the loss compares it with the student's logits at place i, which are about
# token i + 1 (the labels of the cross-entropy beside it are shifted, the rows are not). A student equal to the teacher
# is pushed towards the row before: its KD loss is that of a stranger, and 0 once the rows are moved by one place.
# The two functions are run as they are installed; what they inherit from is replaced by an empty class, for Axolotl's
# own dependencies need a GPU machine. Exits 0 while that is so.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
pip=("$folder/venv/bin/pip" install --quiet --no-compile --disable-pip-version-check)
"${pip[@]}" torch==2.13.0 numpy==2.4.6 2>/dev/null
"${pip[@]}" --no-deps axolotl==0.19.0 2>/dev/null
"$folder/venv/bin/python" -W ignore - <<'PY'
import importlib.util, logging, sys, types
from importlib.metadata import distribution
import torch

files = distribution("axolotl")

def empty(name, **names):
    sys.modules[name] = module = types.ModuleType(name)
    module.__dict__.update(names)

class Nothing:
    def __init__(self, *_, **__): pass

for name in ("axolotl", "axolotl.prompt_strategies", "axolotl.utils"):
    empty(name)
empty("axolotl.prompt_strategies.chat_template", ChatTemplateStrategy=Nothing, StrategyLoader=Nothing)
empty("axolotl.utils.logging", get_logger=logging.getLogger)

def installed(path):
    spec = importlib.util.spec_from_file_location(path.replace("/", "_"), str(files.locate_file(f"axolotl/integrations/kd/{path}.py")))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module

torch.manual_seed(0)
vocabulary, length, prompt = 12, 9, 4
teacher = torch.randn(1, length, vocabulary).mul(3).log_softmax(-1)  # what is said at place i is about token i + 1
ids = torch.randint(0, vocabulary, (length,)).tolist()
# A data set as Axolotl documents it: of every token of the answer, what the teacher gives the words in its place.
rows = [teacher[0, place - 1].topk(vocabulary) for place in range(prompt, length)]
sample = {
    "input_ids": ids,
    "labels": [-100] * prompt + ids[prompt:],
    "logprobs": [row.values.tolist() for row in rows],
    "target_token_ids": [row.indices.tolist() for row in rows],
}
strategy = installed("chat_template").ChatTemplateStrategyWithKDv2(None, None, False, 512)
made = strategy.transform_logprobs(sample)
targets = {name: torch.tensor(made[name])[None] for name in ("target_token_ids", "target_logprobs", "target_mask")}
loss = installed("topk_logprob/forward_kl").loss
as_it_is = loss(teacher, **targets).item() * vocabulary  # its mean is over words
moved = loss(teacher[:, :-1], **{name: value[:, 1:] for name, value in targets.items()}).item() * vocabulary
print(f"axolotl {files.version}: KL of a student that is the teacher, nats per token: {as_it_is:.3f} as it is, {moved:.6f} "
      "with every row one place earlier; expected 0 as it is")
raise SystemExit(0 if as_it_is > 1 and abs(moved) < 1e-4 else 1)
PY
