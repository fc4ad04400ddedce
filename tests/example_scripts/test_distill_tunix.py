"""tunix's trainers with jaxkd's losses: the same numbers as with its own, where both count the same positions."""

import dataclasses
import re
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("tunix")
with warnings.catch_warnings(action="ignore", category=DeprecationWarning):
    from flax import nnx
    from tunix.models.gemma import model as gemma
    from tunix.models.qwen3 import model as qwen3

    from examples import distill_tunix

import jaxkd

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # tunix uses several old names of JAX and Flax

B, T, V = 4, 12, 64
TINY = {**distill_tunix.TINY, "vocab_size": V}


@pytest.fixture
def small(monkeypatch):
    for name in ("TINY_STUDENT", "TINY_TEACHER"):
        config = dataclasses.replace(getattr(distill_tunix, name), vocab_size=512, num_layers=1)
        monkeypatch.setattr(distill_tunix, name, config)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("trainer", distill_tunix.TRAINERS)
def test_trainer(trainer, capsys):
    """Losses of steps that follow each other are equal: so were the gradients of those before."""
    distill_tunix.main(["--trainers", trainer, "--steps", "3", "--length", "32"])
    output = capsys.readouterr().out
    assert float(re.search(r"difference of 3 losses: (\S+)", output)[1]) < 1e-5
    losses = [float(x) for x in re.findall(r"of jaxkd (\S+)\n", output)]
    assert len(set(losses)) == 3  # what is trained, is
    sizes = re.findall(r"takes (\S+) MiB of a device, and its inputs (\S+) MiB", output)
    dense, ours = ([float(size) for size in sizes_of_one] for sizes_of_one in sizes)
    assert ours[0] < dense[0]
    assert ours[1] <= dense[1]


def padded_batch():
    tokens = jax.random.randint(jax.random.key(0), (B, T), 0, V)
    return tokens, jnp.arange(T) < jnp.array([[T], [T - 3], [5], [2]])


def models():
    configs = [
        qwen3.ModelConfig(num_layers=1, embed_dim=width, hidden_dim=width, use_tied_embedding=is_tied, **TINY)
        for width, is_tied in ((16, True), (8, False))
    ]
    return [qwen3.Qwen3(config, rngs=nnx.Rngs(seed)) for seed, config in enumerate(configs)]


def test_padded_batch():
    """tunix's KL counts every position and both its means divide by all; here those count that predict a token."""
    tokens, is_token = padded_batch()
    student, teacher = models()
    inputs = {"input_tokens": tokens, "input_mask": is_token}

    def parts(strategy):
        of_student = strategy.get_student_outputs(student, inputs)
        return of_student, strategy.get_teacher_outputs(teacher, inputs), strategy._labels_fn(**inputs)

    dense, fused = distill_tunix.dense_strategy(V), distill_tunix.FusedLogitStrategy(2.0, 0.5)
    (z, z_teacher, one_hot), (source, of_teacher, labels) = parts(dense), parts(fused)
    theirs, _ = dense.compute_loss(z, z_teacher, one_hot)
    ours, metrics = fused.compute_loss(source, of_teacher, labels)

    log_q, log_p, log_q_1 = (np.asarray(jax.nn.log_softmax(x), np.float64) for x in (z / 2, z_teacher / 2, z))
    kl = 4 * (np.exp(log_p) * (log_p - log_q)).sum(-1)
    hard = -np.take_along_axis(log_q_1, np.asarray(tokens[:, 1:, None]), -1)[..., 0]
    counts = np.asarray(is_token[:, 1:])
    np.testing.assert_allclose(theirs, (kl.mean() + (hard * counts).mean()) / 2, rtol=1e-5)
    np.testing.assert_allclose(ours, (kl[counts].mean() + hard[counts].mean()) / 2, rtol=1e-5)
    assert metrics["num_rows"] == counts.sum()

    every = jnp.broadcast_to(jnp.arange(T) < T - 1, (B, T))
    all_count = {"mask": every, "normalizer": B * (T - 1)}
    as_theirs, _ = jaxkd.distillation_loss(source, of_teacher, labels, **fused.weights, **all_count)
    np.testing.assert_allclose(as_theirs, theirs, rtol=1e-5)


def gemma_model():
    sizes = {"num_layers": 1, "num_embed": V, "embed_dim": 16, "hidden_dim": 16, "num_heads": 2, "head_dim": 8}
    config = dataclasses.replace(gemma.ModelConfig.gemma2_2b(), **sizes, num_kv_heads=1, final_logit_softcap=0.5)
    return gemma.Gemma(config, rngs=nnx.Rngs(0))


@pytest.mark.parametrize(
    "make", [lambda: models()[0], lambda: models()[1], gemma_model], ids=["tied", "untied", "softcap"]
)
def test_logits_are_the_model_s(make):
    model, (tokens, is_token) = make(), padded_batch()
    positions, mask = distill_tunix.positions_and_mask(is_token)
    expected, _ = model(tokens, positions, None, mask)
    source = distill_tunix.linear_logits(model, tokens, positions, mask)
    np.testing.assert_allclose(source.flat().logits(), expected.reshape(-1, V), rtol=1e-5, atol=1e-6)
    assert not nnx.state(model, nnx.Intermediate)
