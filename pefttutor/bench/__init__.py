"""Side-by-side measurements: `python -m pefttutor.bench [names…]`.

Every figure is a ratio measured in one run (ours / peer, smaller is better), never a stored time:

- the sides (ours, the peer and, where there is one, the bound) run interleaved, and their order rotates
  by one place every round, so that none always follows the same one;
- the ratio is the median of the rounds' own ratios, its spread their quartiles; no round is left out,
  but rounds in which a side took over 1.25 times its own median are counted as disturbed;
- bytes: `transient` is the peak of the allocator's own events during a step, `kept` what autograd keeps for
  the backward pass, `state` what an optimizer keeps for its next step, `resident` the growth of resident
  memory in a process of its own;
- on a GPU (`--device cuda`) the clock starts and stops when the device has done all of its orders, the bytes are those
  of CUDA's allocator, and the goals are a GPU's;
- outputs and gradients of the two sides are compared first: a row whose results differ is not a measurement.

A new row is one new file in `pefttutor/bench/rows/` that defines `ROWS`, a list of `Row`.
"""

import os

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # PyTorch's profiler prints a line per start otherwise

from pefttutor.bench.row import Row, discover
from pefttutor.bench.run import Result, run

__all__ = ["Result", "Row", "discover", "run"]
