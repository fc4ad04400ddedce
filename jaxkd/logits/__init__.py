"""Where logits come from: a head and hidden states, or values that exist; and where their gradient goes.

It imports no other room.
"""

from jaxkd.logits.array_ops import logits_dtype as logits_dtype
from jaxkd.logits.array_ops import take_rows as take_rows
from jaxkd.logits.flax_heads import flax_logits as flax_logits
from jaxkd.logits.gradient_place import Place as Place
from jaxkd.logits.gradient_place import placed as placed
from jaxkd.logits.sources import LinearLogits as LinearLogits
from jaxkd.logits.sources import Logits as Logits
from jaxkd.logits.sources import Source as Source
