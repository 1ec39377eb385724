"""One file of `torch.save`, planned from any catalog.

Where there is a model alone, called `model`, the file is its state dict, which `load_state_dict` takes. Else it is a
dict by item. Optimizers are as `Optimizer.state_dict` has them, with numbers for parameters, since that is what
`Optimizer.load_state_dict` takes; the names stand in each group's `param_names`, where torch itself puts them for
optimizers that were made of named parameters.
"""

from resilient.checkpoint.formats.output import Output, SinkOptions
from resilient.checkpoint.formats.source import Source
from resilient.checkpoint.formats.state_items import tree_of
from resilient.checkpoint.formats.torch_write import torch_parts

_NAME = "checkpoint.pt"


def plan(source: Source, options: SinkOptions) -> list[Output]:
    """One file, `options.into` or checkpoint.pt. Raises UsageError for objects that torch's safe reader refuses."""
    tree = tree_of(source, options, numbered=True)
    if list(tree) == ["model"] and isinstance(tree["model"], dict):
        tree = tree["model"]
    return [Output(name=options.into or _NAME, parts=torch_parts(tree))]
