"""What a teacher can be beside a head and hidden states, and how its rows are taken.

It may import `jaxkd.kernels`, `jaxkd.divergences`, `jaxkd.loop` and `jaxkd.logits`.
"""

from jaxkd.teachers.mixture import Mixture as Mixture
from jaxkd.teachers.protocol import Teacher as Teacher
from jaxkd.teachers.protocol import TeacherRows as TeacherRows
from jaxkd.teachers.protocol import check_teacher as check_teacher
from jaxkd.teachers.protocol import rows_of as rows_of
from jaxkd.teachers.routed import Routed as Routed
from jaxkd.teachers.top_k import TopKLogProbs as TopKLogProbs
from jaxkd.teachers.vocabulary_map import VocabularyMap as VocabularyMap
