"""The losses of rows that users call.

It may import `jaxkd.teachers`, `jaxkd.kernels`, `jaxkd.divergences`, `jaxkd.loop` and `jaxkd.logits`.
"""

from jaxkd.losses.chunked_losses import chunked_loss as chunked_loss
from jaxkd.losses.chunked_losses import chunked_rows as chunked_rows
from jaxkd.losses.cross_entropy_loss import cross_entropy as cross_entropy
from jaxkd.losses.distillation import distillation_loss as distillation_loss
from jaxkd.losses.distillation import fused_linear_jsd as fused_linear_jsd
from jaxkd.losses.divergences_by_token import token_divergences as token_divergences
from jaxkd.losses.entropies import token_entropies as token_entropies
from jaxkd.losses.hidden_states import hidden_cosine as hidden_cosine
from jaxkd.losses.hidden_states import hidden_mse as hidden_mse
from jaxkd.losses.log_probs import sequence_log_probs as sequence_log_probs
from jaxkd.losses.log_probs import token_log_probs as token_log_probs
from jaxkd.losses.next_tokens import shift_labels as shift_labels
from jaxkd.losses.row_statistics import token_statistics as token_statistics
