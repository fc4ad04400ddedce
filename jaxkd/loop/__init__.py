"""THE loop over chunks of rows: which rows count, how many are together, what each device has. It knows no loss.

It may import `jaxkd.logits`.
"""

from jaxkd.loop.chunk_pass import Plan as Plan
from jaxkd.loop.chunk_size import Chunks as Chunks
from jaxkd.loop.chunk_size import rows_of_chunk as rows_of_chunk
from jaxkd.loop.chunked import map_rows as map_rows
from jaxkd.loop.chunked import read_rows as read_rows
from jaxkd.loop.chunked import sum_rows as sum_rows
from jaxkd.loop.partitioning import Sharding as Sharding
from jaxkd.loop.row_weights import CountedRows as CountedRows
from jaxkd.loop.row_weights import Metrics as Metrics
from jaxkd.loop.row_weights import count_rows as count_rows
from jaxkd.loop.row_weights import metrics_of as metrics_of
from jaxkd.loop.row_weights import weighted as weighted
