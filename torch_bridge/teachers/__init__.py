"""A PyTorch model as a teacher for JAX: live or read once to disk, and which tokens two tokenizers share.

May import jaxkd and `torch_bridge.convert`.
"""

from torch_bridge.teachers.fingerprints import model_fingerprint as model_fingerprint
from torch_bridge.teachers.fingerprints import tokenizer_fingerprint as tokenizer_fingerprint
from torch_bridge.teachers.live_teacher import LiveTeacher as LiveTeacher
from torch_bridge.teachers.teacher_cache import CacheError as CacheError
from torch_bridge.teachers.teacher_cache import TeacherBatch as TeacherBatch
from torch_bridge.teachers.teacher_cache import TeacherCache as TeacherCache
from torch_bridge.teachers.teacher_cache import cache_teacher as cache_teacher
from torch_bridge.teachers.teacher_cache import open_teacher_cache as open_teacher_cache
from torch_bridge.teachers.vocabularies import match_vocabularies as match_vocabularies
