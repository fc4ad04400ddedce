"""On-policy distillation at a tiny size: the sampler, its labels, a batch's loss, and the whole command."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from flax import nnx
from smollm2_cases import assert_same_losses, interrupt_after, records, save_tiny_teacher, tiny_llama

import jaxkd
from examples import on_policy
from examples.smollm2 import flags, sampling, teacher, training
from examples.smollm2.model import student_from_teacher

PROMPT, NEW, STEPS = 4, 9, 6


@pytest.fixture(scope="module")
def torch_model():
    return tiny_llama().requires_grad_(False)


@pytest.fixture(scope="module")
def student(torch_model):
    return student_from_teacher(torch_model, 2)


@pytest.fixture(scope="module")
def prompts():
    return jnp.asarray(np.random.default_rng(1).integers(3, 300, (3, PROMPT)), jnp.int32)


@nnx.jit(static_argnames="end_tokens")
def sample(student, prompts, key, temperature, end_tokens=()):
    return sampling.sample(student, prompts, NEW, key, temperature=temperature, end_tokens=end_tokens)


@nnx.jit
def draw_from_whole_texts(student, tokens, key, position, temperature):
    """The token at ``position``, from a forward pass without a cache over all tokens, of which it sees those before."""
    logits = student(tokens)[:, position - 1] @ student.head.T
    return jax.random.categorical(jax.random.fold_in(key, position), logits / temperature)


@pytest.mark.parametrize("temperature", [1.0, 0.3])
def test_samples_are_those_of_a_forward_pass_without_a_cache(student, prompts, temperature):
    key = jax.random.key(5)
    actual = sample(student, prompts, key, temperature)
    expected = jnp.zeros_like(actual).at[:, :PROMPT].set(prompts)
    for position in range(PROMPT, PROMPT + NEW):
        drawn = draw_from_whole_texts(student, expected, key, position, temperature)
        expected = expected.at[:, position].set(drawn)
    np.testing.assert_array_equal(actual, expected)
    assert len(np.unique(actual[:, PROMPT:])) > NEW


def test_a_text_ends_at_its_end_and_the_others_go_on(student, prompts):
    key = jax.random.key(5)
    free = np.asarray(sample(student, prompts, key, 1.0))
    # Two ends of text: one that the first row samples at its third token, one that stands in the second row's prompt.
    ends = int(free[0, PROMPT + 2]), int(prompts[1, 0])
    ended = np.asarray(sample(student, prompts, key, 1.0, end_tokens=ends))
    expected, labels = free.copy(), np.full_like(free, -100)
    for row in range(len(free)):
        (at,) = np.nonzero(np.isin(free[row, PROMPT:], ends))
        length = PROMPT + at[0] + 1 if len(at) else PROMPT + NEW
        expected[row, length:] = ends[0]
        labels[row, PROMPT - 1 : length - 1] = free[row, PROMPT:length]
    assert (labels[0] != -100).sum() == 3
    assert (labels[1] != -100).sum() > 3
    np.testing.assert_array_equal(ended, expected)
    np.testing.assert_array_equal(sampling.sampled_labels(jnp.asarray(ended), PROMPT, ends), labels)


def test_labels_by_hand():
    tokens = jnp.array([[7, 2, 5, 6, 2, 9, 2], [7, 8, 2, 2, 2, 2, 2], [7, 8, 5, 6, 3, 1, 4]])
    expected = [
        [-100, 5, 6, 2, -100, -100, -100],  # the end of text in the prompt ends nothing
        [-100, 2, -100, -100, -100, -100, -100],  # ended at once
        [-100, 5, 6, 3, -100, -100, -100],  # by the other end of text
    ]
    np.testing.assert_array_equal(sampling.sampled_labels(tokens, 2, (2, 3)), expected)
    no_end = sampling.sampled_labels(tokens, 2, ())
    np.testing.assert_array_equal(no_end[0], [-100, 5, 6, 2, 9, 2, -100])


def log_softmax(logits):
    logits = np.asarray(logits, np.float64)
    logits = logits - logits.max(axis=-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))


def test_loss_of_a_batch_is_the_dense_one(torch_model, student, prompts):
    """In float64, the teacher by PyTorch: the mean over sampled tokens, without the prompt and what follows an end."""
    graphdef, params = nnx.split(student)
    windows = jnp.pad(prompts, ((0, 0), (0, NEW - 1)))  # but for the prompt, what is in a window does not matter
    flax_teacher = student_from_teacher(torch_model, 4)
    ends = (int(sample(student, prompts, jax.random.key(5), 1.0)[0, PROMPT + 2]),)
    sample_batch = sampling.make_sample_batch(
        graphdef, flax_teacher, flax_teacher.head, prompt_length=PROMPT, temperature=1.0, end_tokens=ends
    )
    batch = sample_batch(params, windows, jax.random.key(5))
    tokens, labels = np.asarray(batch.tokens), np.asarray(batch.labels)
    assert tokens.shape == labels.shape == windows.shape
    assert (labels[0] != -100).sum() == 3

    exact = tiny_llama().double()
    with torch.inference_mode():
        log_p = log_softmax(exact(input_ids=torch.from_numpy(tokens.astype(np.int64))).logits.numpy())
    hidden = nnx.jit(lambda model, x: model(x))(student, batch.tokens)
    log_q = log_softmax(np.asarray(hidden, np.float64) @ np.asarray(student.head, np.float64).T)
    counts = labels != -100
    reverse_kl = np.sum(np.exp(log_q) * (log_q - log_p), axis=-1)[counts].mean()
    assert training.make_sampled_kl(graphdef)(params, batch) == pytest.approx(reverse_kl, rel=1e-4)

    log_m = np.logaddexp(log_p, log_q) - np.log(2)
    both = np.sum(np.exp(log_p) * (log_p - log_m) + np.exp(log_q) * (log_q - log_m), axis=-1) / 2
    optimizer = optax.sgd(0.1)
    step = training.make_train_step(graphdef, optimizer, divergence=jaxkd.jensen_shannon(0.5))
    state, metrics = step(training.fresh_state(params, optimizer, "cpu"), batch, 2.0, 0.0)
    assert metrics["loss"] == pytest.approx(2 * both[counts].mean(), rel=1e-4)
    assert metrics["num_rows"] == counts.sum()
    assert training.make_sampled_kl(graphdef)(state["params"], batch) < reverse_kl


def test_sampled_loss_has_the_gradient_of_reverse_kl_in_the_mean():
    """Over every token that there is, weighed as often as it is sampled."""
    student_logits, teacher_logits = np.random.default_rng(2).normal(size=(2, 7))

    def loss_of_token(logits, token):
        student, teacher = (jaxkd.Logits(jnp.asarray(x, jnp.float32)[None, None]) for x in (logits, teacher_logits))
        labels = jnp.full((1, 1), token)
        return sampling.sampled_reverse_kl(student, teacher, labels, soft_weight=2.0)[0]

    gradients = jax.vmap(jax.grad(loss_of_token), (None, 0))(jnp.asarray(student_logits, jnp.float32), jnp.arange(7))
    log_q, log_p = log_softmax(student_logits), log_softmax(teacher_logits)
    q, difference = np.exp(log_q), log_q - log_p
    np.testing.assert_allclose(q @ gradients, 2 * q * (difference - q @ difference), rtol=1e-4, atol=1e-6)


def test_share_of_sampled_batches():
    for share, expected in ((0.0, 0), (0.25, 5), (0.5, 10), (1.0, 20)):
        sampled = [sampling.is_sampled(step, share, warm_up=7) for step in range(1, 28)]
        assert sum(sampled) == expected
        assert not any(sampled[:7])
    evenly = [sampling.is_sampled(step, 0.5, warm_up=1) for step in range(1, 7)]
    assert evenly == [False, False, True, False, True, False]


@pytest.fixture(scope="module")
def command(tmp_path_factory):
    """The flags of a tiny run, but for ``--out``."""
    folder = save_tiny_teacher(tmp_path_factory.mktemp("teacher"))
    paths = f"--teacher {folder} --text {folder / 'text.txt'} --cache {folder / 'cache'} --device cpu"
    sizes = f"--steps {STEPS} --student-layers 2 --batch-size 2 --seq-len 12 --prompt-len 4 --warm-up 2"
    often = "--held-out-windows 4 --train-windows 12 --checkpoint-every 2 --eval-every 3 --learning-rate 0.01"
    return f"{paths} {sizes} {often}".split()


@pytest.fixture(scope="module")
def finished(command, tmp_path_factory):
    """The folder of a run that nothing disturbed."""
    out = tmp_path_factory.mktemp("finished") / "run"
    assert on_policy.main([*command, "--out", str(out)]) == 0
    return out


def test_a_run_leaves_scores_of_three_arms(finished):
    arms = on_policy.CROSS_ENTROPY, on_policy.OFF_POLICY, on_policy.ON_POLICY
    assert (finished / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in (finished / "checkpoints").iterdir()] == [str(3 * STEPS)]
    scores = {(record["model"], record["step"]): record for record in records(finished, "held_out")}
    trained = {(arm, step) for arm in arms for step in (3, STEPS)}
    assert set(scores) == {("teacher", 0), ("pruned, untrained", 0)} | trained
    start = scores["pruned, untrained", 0]
    assert scores[on_policy.CROSS_ENTROPY, STEPS]["next_token_loss"] < start["next_token_loss"]
    for arm in arms[1:]:
        assert scores[arm, STEPS]["jsd"] < start["jsd"]
        assert scores[arm, STEPS]["sampled_kl"] < start["sampled_kl"]


def test_batches_are_sampled_after_the_warm_up(finished):
    """With a share of a half every other step after two, and until the first of them the arm is that off policy."""
    steps = {arm: {} for arm in (on_policy.OFF_POLICY, on_policy.ON_POLICY)}
    for record in records(finished, "train"):
        steps.setdefault(record["model"], {})[record["step"]] = record
    off, on = steps[on_policy.OFF_POLICY], steps[on_policy.ON_POLICY]
    assert [on[step]["loss"] for step in (1, 2, 3)] == [off[step]["loss"] for step in (1, 2, 3)]
    rows = {step: record["num_rows"] for step, record in on.items()}
    assert all(rows[step] == 2 * 12 for step in (1, 2, 3, 5))
    assert all(0 < rows[step] <= 2 * (12 + 1 - 4) for step in (4, 6))


def test_stopped_run_resumes_to_the_same_losses(command, finished, tmp_path, monkeypatch, capsys):
    """By Ctrl-C at a step that is sampled."""
    out, position = tmp_path / "run", 2 * STEPS + 4
    with monkeypatch.context() as patch:
        interrupt_after(position, patch)
        assert on_policy.main([*command, "--out", str(out)]) == 130
    assert f"stopped after step {position} of {3 * STEPS}: add --resume" in capsys.readouterr().out
    assert on_policy.main([*command, "--out", str(out), "--resume"]) == 0
    assert_same_losses(out, finished, 3 * STEPS)


def test_resume_with_another_share_is_refused(command, finished, capsys):
    assert on_policy.main([*command, "--out", str(finished), "--resume", "--on-policy", "0.25"]) == 1
    assert "on_policy was 0.5, now 0.25" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ("--on-policy 1.5", "argument --on-policy: 1.5 is not a number at least 0 and at most 1"),
        ("--prompt-len 20 --seq-len 19", "argument --prompt-len: 20 is longer than --seq-len 19"),
        (
            "--loss sampled --divergence jensen_shannon",
            "sampled is an estimate of reverse_kl, and --divergence is jensen",
        ),
        ("--loss sampled --temperature 2", "sampled wants --temperature and --sample-temperature to be the same"),
        ("--soft-weight 0 --hard-weight 1", "argument --soft-weight: at 0 there is nothing to learn from samples"),
    ],
)
def test_bad_flag_is_one_line(capsys, bad, message):
    with pytest.raises(SystemExit) as raised:
        flags.parse_on_policy(bad.split())
    assert raised.value.code == 2
    assert message in capsys.readouterr().err


def test_end_tokens_are_those_of_generation(torch_model, monkeypatch):
    for ids, expected in ((None, ()), (2, (2,)), ([2, 0], (2, 0))):
        monkeypatch.setattr(torch_model.generation_config, "eos_token_id", ids)
        assert teacher.end_tokens(torch_model) == expected
