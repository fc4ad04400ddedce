"""A PyTorch model as the teacher, live and from a cache, against the logits that the model makes itself."""

import copy
import tempfile
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from torch import nn

import jaxkd
from torch_bridge import reference
from torch_bridge.parity.comparison import Comparison, Tensors
from torch_bridge.teachers import LiveTeacher, cache_teacher

HIDDEN, TEACHER_HIDDEN, VOCABULARY, LENGTHS = 32, 48, 523, (37, 12, 30, 5)


class TinyModel(nn.Module):
    """What a causal language model shows of itself, with all that a head may have: a bias, a scale, a softcap."""

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(logit_scale=0.8, final_logit_softcapping=10.0, to_dict=dict)
        self.embed = nn.Embedding(VOCABULARY, TEACHER_HIDDEN)
        self.mix = nn.Conv1d(TEACHER_HIDDEN, TEACHER_HIDDEN, kernel_size=3)
        self.head = nn.Linear(TEACHER_HIDDEN, VOCABULARY)

    @property
    def device(self) -> torch.device:
        return self.head.weight.device

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embed

    def get_output_embeddings(self) -> nn.Linear:
        return self.head

    def last_hidden(self, input_ids: torch.Tensor) -> torch.Tensor:
        return 3 * torch.tanh(self.mix(nn.functional.pad(self.embed(input_ids).mT, (2, 0)))).mT

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return 10 * torch.tanh(0.8 * self.head(hidden) / 10)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> SimpleNamespace:
        return SimpleNamespace(logits=self.logits(self.last_hidden(input_ids)))


def comparisons(device: str = "cpu") -> list[Comparison]:
    """Both ways in float32 and bfloat16, on texts of several lengths."""
    return [case for dtype in (torch.float32, torch.bfloat16) for case in _comparisons(dtype, device)]


def _comparisons(dtype: torch.dtype, device: str) -> list[Comparison]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = TinyModel().to(device, dtype).eval().requires_grad_(False)
        texts = [torch.randint(VOCABULARY, (length,)).numpy() for length in LENGTHS]
        shape = (len(LENGTHS), max(LENGTHS) - 1)
        inputs = {
            "hidden": torch.randn(*shape, HIDDEN).to(device, dtype),
            "weight": (torch.randn(VOCABULARY, HIDDEN) / HIDDEN**0.5).to(device, dtype),
        }
    with tempfile.TemporaryDirectory() as folder:
        kept = str(dtype).removeprefix("torch.")
        cache = cache_teacher(model, texts, folder, tokenizer=None, dtype=kept, batch_size=len(texts))
        cached = cache.batch(np.arange(len(texts)))
    live = LiveTeacher(model)(cached.tokens)

    exact_model = copy.deepcopy(model).double()
    labels = torch.from_numpy(np.array(cached.labels)).to(device).long()
    with torch.no_grad():
        hidden = model.last_hidden(torch.from_numpy(np.array(cached.tokens)).to(device).long())
        exact_logits = exact_model.logits(hidden.double())

    def of_torch(tensors: Tensors) -> torch.Tensor:
        return reference.distillation_loss(
            reference.LinearLogits(tensors["hidden"], tensors["weight"]),
            reference.Logits(exact_logits),
            labels,
            divergence=reference.jensen_shannon(0.5),
            hard_weight=0.3,
        )[0]

    def case(name: str, teacher: jaxkd.LinearLogits) -> Comparison:
        def of_jax(arrays: dict[str, Any]) -> tuple[jax.Array, dict[str, jax.Array]]:
            return jaxkd.distillation_loss(
                jaxkd.LinearLogits(arrays["hidden"], arrays["weight"]),
                teacher,
                jnp.asarray(cached.labels),
                divergence=jaxkd.jensen_shannon(0.5),
                hard_weight=0.3,
            )

        return Comparison("teacher", name, "bias, scale, softcap; ragged texts", inputs, of_jax, of_torch)

    return [case("LiveTeacher", live), case("cache_teacher", cached.teacher)]
