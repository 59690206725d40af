"""Pictures to look inside a model: a static figure first, the sliders second.

`Explorer` turns any function that draws a figure into a widget; `ranks` shows the rank of what a method learnt,
`moving_ranks` where the ranks went while it trained, `masks` which entries a method trains, `memory` what a training
step needs and what to change to make it fit.
"""

# Imported here, not on demand: `widgets.ranks` must be the callable, never the submodule of the same name.
from pefttutor.widgets.explorer import Explorer
from pefttutor.widgets.masks import masks
from pefttutor.widgets.memory import memory
from pefttutor.widgets.moving_ranks import RankRecord, moving_ranks
from pefttutor.widgets.ranks import ranks
from pefttutor.widgets.style import Picture

__all__ = ["Explorer", "Picture", "RankRecord", "masks", "memory", "moving_ranks", "ranks"]
