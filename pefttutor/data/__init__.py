"""Data: tasks, text to tensors, batches, and how well a model does on them.

What a label predicts, which labels count, and how examples become a batch are decided here, once. Nothing in here
knows a method.
"""

from pefttutor.data.batches import collate
from pefttutor.data.encoding import encode
from pefttutor.data.forgetting import held_out_loss
from pefttutor.data.scoring import score
from pefttutor.data.stopping import stops
from pefttutor.data.tasks import TaskInfo, info, load, names

__all__ = ["TaskInfo", "collate", "encode", "held_out_loss", "info", "load", "names", "score", "stops"]
