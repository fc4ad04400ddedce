"""What is jitted: the optax step of every arm, and the scores on held-out text."""

from functools import partial

import jax
import jax.numpy as jnp
import optax
from flax import nnx

import jaxkd


def optimizer_for(learning_rate, steps):
    """AdamW behind a clip of the global norm; the rate warms up over a tenth of the steps, then falls as a cosine."""
    schedule = optax.warmup_cosine_decay_schedule(0.0, learning_rate, max(1, steps // 10), max(2, steps))
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, b2=0.95, weight_decay=0.01))


def fresh_state(params, optimizer, device):
    """The state before the first step, with a copy of ``params``: a step donates what it is given."""
    params = jax.tree.map(jnp.copy, params)
    state = {"params": params, "opt_state": optimizer.init(params)}
    return jax.device_put(state, jax.devices(device)[0])  # committed, as a step returns it: else it compiles twice


def make_train_step(graphdef, optimizer, loss=jaxkd.distillation_loss, **loss_options):
    """``step(state, batch, soft_weight, hard_weight) -> (state, metrics)``, compiled once for each pair of weights.

    The weights are numbers known to the compiler: with a ``soft_weight`` of 0 the teacher's head is not multiplied.
    ``state`` is ``{"params", "opt_state"}`` and is donated; ``batch`` is (tokens, labels, teacher).
    """

    @partial(jax.jit, static_argnums=(2, 3), donate_argnums=0)
    def step(state, batch, soft_weight, hard_weight):
        tokens, labels, teacher = batch

        def loss_fn(params):
            model = nnx.merge(graphdef, params)
            student = jaxkd.LinearLogits(model(tokens), model.head)
            return loss(student, teacher, labels, soft_weight=soft_weight, hard_weight=hard_weight, **loss_options)

        (total, metrics), gradients = jax.value_and_grad(loss_fn, has_aux=True)(state["params"])
        updates, opt_state = optimizer.update(gradients, state["opt_state"], state["params"])
        params = optax.apply_updates(state["params"], updates)
        return {"params": params, "opt_state": opt_state}, {"loss": total, **metrics}

    return step


def top_tokens(hidden, head, chunk_size=256):
    """The likeliest token of each row of ``hidden`` (N, D), ``chunk_size`` rows of logits at a time."""

    def top_token(row):
        return jnp.argmax(jnp.dot(head.astype(row.dtype), row, preferred_element_type=jnp.float32))

    return jax.lax.map(top_token, hidden, batch_size=chunk_size)


def score(hidden, head, labels, teacher_hidden, teacher_head):
    """How a model with these hidden states (T, D) does: next-token loss, JSD to the teacher and top-1 agreement."""
    _, metrics = jaxkd.fused_linear_jsd(hidden, head, teacher_hidden, teacher_head, labels, beta=0.5)
    agreement = jnp.mean(top_tokens(hidden, head) == top_tokens(teacher_hidden, teacher_head))
    return {"next_token_loss": metrics["hard"], "jsd": metrics["soft"], "agreement": agreement}


def make_evaluate(graphdef):
    """``evaluate(params, batch) -> scores``, the mean over the batch's windows, one at a time."""

    @jax.jit
    def evaluate(params, batch):
        model = nnx.merge(graphdef, params)
        tokens, labels, teacher = batch

        def window(arguments):
            tokens, labels, teacher_hidden = arguments
            return score(model(tokens[None])[0], model.head, labels, teacher_hidden, teacher.weight)

        return jax.tree.map(jnp.mean, jax.lax.map(window, (tokens, labels, teacher.hidden)))

    return evaluate


def make_sampled_kl(graphdef):
    """``sampled_kl(params, batch)``: KL(student ‖ teacher), the mean over the tokens of ``batch`` that have a label."""

    @jax.jit
    def sampled_kl(params, batch):
        model = nnx.merge(graphdef, params)
        tokens, labels, teacher = batch
        student = jaxkd.LinearLogits(model(tokens), model.head)
        return jaxkd.distillation_loss(student, teacher, labels, divergence=jaxkd.reverse_kl)[0]

    return sampled_kl


@jax.jit
def evaluate_teacher(batch):
    """The teacher's own scores, by the same code: its next-token loss is what a student can hope for."""
    _, labels, teacher = batch

    def window(arguments):
        labels, hidden = arguments
        return score(hidden, teacher.weight, labels, hidden, teacher.weight)

    return jax.tree.map(jnp.mean, jax.lax.map(window, (labels, teacher.hidden)))
