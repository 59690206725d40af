"""Training: `fit`, its run and losses, `fit_head`, and the callback for transformers' Trainer.

The loop knows attachments and their methods only through the hooks of `method.Trains`. What a method adds to
training is a hook in the method's own file, never a case in here.
"""

from pefttutor.data.evaluation import evaluate
from pefttutor.train.head import FittedHead, fit_head
from pefttutor.train.history import History
from pefttutor.train.loop import fit
from pefttutor.train.schedule import lr_factor, step_indices
from pefttutor.train.trainer import callback

__all__ = ["FittedHead", "History", "callback", "evaluate", "fit", "fit_head", "lr_factor", "step_indices"]
