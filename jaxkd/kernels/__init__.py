"""The rows of one chunk: logits in, losses and the logits' gradient out, in XLA and as GPU kernels behind one door.

It may import `jaxkd.divergences`, `jaxkd.loop` and `jaxkd.logits`.
"""

from jaxkd.kernels.bucketed import Buckets as Buckets
from jaxkd.kernels.bucketed import Partition as Partition
from jaxkd.kernels.bucketed import buckets_of as buckets_of
from jaxkd.kernels.bucketed import partition_by as partition_by
from jaxkd.kernels.bucketed import token_ids as token_ids
from jaxkd.kernels.dispatch import CannotRun as CannotRun
from jaxkd.kernels.dispatch import Chunk as Chunk
from jaxkd.kernels.dispatch import aligned_width as aligned_width
from jaxkd.kernels.dispatch import row_losses_for as row_losses_for
from jaxkd.kernels.likeliest import at_tokens as at_tokens
from jaxkd.kernels.likeliest import top_tokens as top_tokens
from jaxkd.kernels.reference import log_sum_exp as log_sum_exp
from jaxkd.kernels.reference import own_columns as own_columns
from jaxkd.kernels.reference import row_gradient as row_gradient
from jaxkd.kernels.reference import top_token as top_token
from jaxkd.kernels.signature import ChunkRows as ChunkRows
from jaxkd.kernels.signature import LogSumExp as LogSumExp
from jaxkd.kernels.signature import RowLosses as RowLosses
from jaxkd.kernels.signature import RowOptions as RowOptions
from jaxkd.kernels.signature import RowSums as RowSums
from jaxkd.kernels.signature import VocabularyShards as VocabularyShards
from jaxkd.kernels.signature import names_of_sums as names_of_sums
