"""Text of the student's own: sampled with a key-value cache, and labelled so that only what was sampled counts."""

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx

import jaxkd
from examples.smollm2 import training
from examples.smollm2.model import student_from_teacher
from examples.smollm2.teacher import end_tokens as end_tokens_of
from torch_bridge import TeacherBatch

IGNORED = -100  # the label of a token that does not count


def sample(model, prompts, num_new, key, *, temperature, end_tokens):
    """(B, P + num_new): the prompts (B, P), none padded, and up to ``num_new`` tokens that ``model`` goes on with.

    The token at position t is drawn with the key ``fold_in(key, t)``. After one of ``end_tokens`` a row is filled up
    with the first of them, and all stop when each row has ended.
    """
    batch_size, prompt_length = prompts.shape
    length = prompt_length + num_new
    ends = jnp.array(end_tokens, jnp.int32)
    filler = end_tokens[0] if end_tokens else 0

    def goes_on(carry):
        position, _, _, _, has_ended = carry
        return (position < length) & ~jnp.all(has_ended)

    def draw(carry):
        position, tokens, hidden, cache, has_ended = carry
        logits = jaxkd.LinearLogits(hidden, model.head).logits()  # (B, V), one position's: small enough to be held
        drawn = jax.random.categorical(jax.random.fold_in(key, position), logits / temperature)
        drawn = jnp.where(has_ended, filler, drawn)
        tokens = tokens.at[:, position].set(drawn)
        hidden, cache = model.extend(drawn[:, None], cache, position)
        return position + 1, tokens, hidden[:, -1], cache, has_ended | jnp.isin(drawn, ends)

    tokens = jnp.full((batch_size, length), filler, jnp.int32).at[:, :prompt_length].set(prompts)
    hidden, cache = model.extend(prompts, model.empty_cache(batch_size, length), 0)
    carry = prompt_length, tokens, hidden[:, -1], cache, jnp.zeros(batch_size, bool)
    return jax.lax.while_loop(goes_on, draw, carry)[1]


def sampled_labels(tokens, prompt_length, end_tokens):
    """The labels (B, T) of ``tokens`` (B, T): what was sampled, up to and with the first end of text; else `IGNORED`.

    An end of text within the prompt ends nothing.
    """
    is_sampled = jnp.arange(tokens.shape[1]) >= prompt_length
    is_end = is_sampled & jnp.isin(tokens, jnp.array(end_tokens, jnp.int32))
    is_after_end = jnp.cumsum(is_end, axis=1) - is_end > 0
    return jaxkd.shift_labels(tokens, is_sampled & ~is_after_end, IGNORED)


def sampled_reverse_kl(student, teacher, labels, *, soft_weight, hard_weight=0.0, **options):
    """KL(student ‖ teacher) estimated from the sampled tokens alone, in place of `jaxkd.distillation_loss`.

    The two heads give one number a token, and the gradient is the policy gradient of the KL divergence, provided that
    the tokens were sampled at the temperature of ``options``. The whole distributions give the same in the mean, with
    less variance.
    """
    policy, reference = (jaxkd.token_log_probs(model, labels, **options) for model in (student, teacher))
    loss, metrics = jaxkd.preference.sampled_kl(policy, None, reference, labels != IGNORED)
    return soft_weight * loss, {"soft": loss, "num_rows": metrics["num_tokens"]}


def is_sampled(step, share, warm_up):
    """Whether the student samples the batch of this step, the first of which is 1: evenly spaced after a warm-up."""
    after = step - warm_up
    return after > 0 and int(after * share) > int((after - 1) * share)


def key_of(seed, step):
    """Of the samples of a step: a function of both alone, so that a resumed run draws the same."""
    return jax.random.fold_in(jax.random.key(seed), step)


def make_sample_batch(student_graphdef, teacher, teacher_head, *, prompt_length, temperature, end_tokens):
    """``sample_batch(params, tokens, key) -> TeacherBatch``: texts of the student's, as the teacher reads them.

    They begin as ``tokens`` (B, T) do, with ``prompt_length`` of them, and have room for one more, the last label, as
    a window of text has. ``teacher`` is the Flax port.
    """
    teacher_graphdef, teacher_params = nnx.split(teacher)

    @partial(jax.jit, static_argnames="num_new")
    def sample_and_read(params, teacher_params, prompts, key, num_new):
        student, teacher = nnx.merge(student_graphdef, params), nnx.merge(teacher_graphdef, teacher_params)
        tokens = sample(student, prompts, num_new, key, temperature=temperature, end_tokens=end_tokens)
        labels = sampled_labels(tokens, prompt_length, end_tokens)
        return tokens[:, :-1], labels[:, :-1], teacher(tokens[:, :-1])

    def sample_batch(params, tokens, key):
        num_new = tokens.shape[1] + 1 - prompt_length
        sampled = sample_and_read(params, teacher_params, tokens[:, :prompt_length], key, num_new)
        tokens, labels, hidden = sampled
        return TeacherBatch(tokens, labels, jaxkd.LinearLogits(hidden, teacher_head))

    return sample_batch


def sampler_of(torch_model, job, settings):
    """``graphdef -> sample_batch`` of a student, read by a Flax port of the PyTorch teacher on the same device."""
    return partial(
        make_sample_batch,
        teacher=student_from_teacher(torch_model, torch_model.config.num_hidden_layers, job.dtype),
        teacher_head=job.held_out.teacher.weight,
        prompt_length=settings.prompt_len,
        temperature=settings.sample_temperature,
        end_tokens=end_tokens_of(torch_model),
    )


def make_evaluate(graphdef, sample_batch, held_out, seed):
    """``evaluate(params)``: scores on held-out text, and the divergence from the teacher on samples."""
    score_on_text, sampled_kl = training.make_evaluate(graphdef), training.make_sampled_kl(graphdef)

    def evaluate(params):
        samples = sample_batch(params, held_out.tokens, key_of(seed, 0))
        return score_on_text(params, held_out) | {"sampled_kl": sampled_kl(params, samples)}

    return evaluate
