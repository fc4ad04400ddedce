"""What a divergence between teacher and student is: declarations only, one formula each. `kernels` computes them.

It may import `jaxkd.loop` (its checks) and `jaxkd.logits`.
"""

from jaxkd.divergences.declaration import AnyDivergence as AnyDivergence
from jaxkd.divergences.declaration import Divergence as Divergence
from jaxkd.divergences.declaration import RowDivergence as RowDivergence
from jaxkd.divergences.declaration import check_divergence as check_divergence
from jaxkd.divergences.declaration import weigh as weigh
from jaxkd.divergences.functions_of_sums import overlap_nll as overlap_nll
from jaxkd.divergences.functions_of_sums import renyi as renyi
from jaxkd.divergences.sums_over_tokens import alpha_beta as alpha_beta
from jaxkd.divergences.sums_over_tokens import alpha_divergence as alpha_divergence
from jaxkd.divergences.sums_over_tokens import forward_kl as forward_kl
from jaxkd.divergences.sums_over_tokens import hellinger as hellinger
from jaxkd.divergences.sums_over_tokens import jensen_shannon as jensen_shannon
from jaxkd.divergences.sums_over_tokens import reverse_kl as reverse_kl
from jaxkd.divergences.sums_over_tokens import skew_kl as skew_kl
from jaxkd.divergences.sums_over_tokens import symmetric_kl as symmetric_kl
from jaxkd.divergences.sums_over_tokens import total_variation as total_variation
from jaxkd.divergences.whole_rows import cosine_distance as cosine_distance
from jaxkd.divergences.whole_rows import earth_mover as earth_mover
from jaxkd.divergences.whole_rows import kernel_distance as kernel_distance
from jaxkd.divergences.whole_rows import mse as mse
from jaxkd.divergences.whole_rows import sinkhorn as sinkhorn
